#include "near_panel.h"

#include <cstring>

namespace granet {

NearPanel::NearPanel(const KernelSet& k, int64_t h, int64_t w, int64_t stride)
    : k_(k), h_(h), w_(w), stride_(stride), pitch_((stride == 1 ? h + 2 : 4 * h + 2) * row()) {
    const auto all = LaneMask((1u << k.lanes) - 1);
    for (int number = 0; number < WHOLE_TAPS; ++number) {
        const int down = number / 3, dx = number % 3 - 1;
        const bool reads_left = dx < 0, reads_right = dx > 0 && stride == 1;
        const int64_t first = stride == 1 ? down : plane(down != 1, dx != 0) + (down == 2);
        const int64_t pixel = first * w + (reads_right ? 1 : reads_left ? -1 : 0);
        const auto left = LaneMask(reads_left ? all & ~1u : all), right = LaneMask(reads_right ? all >> 1 : all);
        taps_[number] = {pixel * ptrdiff_t(sizeof(float)) - number, left, right, LaneMask(left & right)};
    }
}

int64_t NearPanel::plane(bool odd_row, bool odd_column) const {
    return odd_row ? 2 * h_ + (odd_column ? h_ + 1 : 0) : odd_column ? h_ : 0;
}

void NearPanel::pack(const float* image, int64_t channel_stride, int64_t channels, char* panel) const {
    for (int64_t channel = 0; channel < channels; ++channel, image += channel_stride, panel += pitch_)
        stride_ == 1 ? pack_whole(image, panel) : pack_planes(image, panel);
}

void NearPanel::pack_whole(const float* channel, char* to) const {
    std::memset(to, 0, row());
    k_.copy(reinterpret_cast<const char*>(channel), reinterpret_cast<float*>(to + row()), h_ * w_ / k_.lanes, false);
    std::memset(to + pitch_ - row(), 0, row());
}

void NearPanel::pack_planes(const float* channel, char* to) const {
    std::memset(to + plane(true, false) * row(), 0, row());
    std::memset(to + plane(true, true) * row(), 0, row());
    for (int64_t y = 0; y < 2 * h_; ++y) {
        const bool odd = y % 2;
        auto* even = reinterpret_cast<float*>(to + (plane(odd, false) + y / 2 + odd) * row());
        auto* others = reinterpret_cast<float*>(to + (plane(odd, true) + y / 2 + odd) * row());
        k_.take_second(channel + y * 2 * w_, 2 * w_, even, others);
    }
}

}  // namespace granet
