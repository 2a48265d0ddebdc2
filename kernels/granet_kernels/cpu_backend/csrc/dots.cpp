#include "dots.h"

#include <algorithm>

namespace granet {

void DotItem::add(int64_t panel_number, int64_t band, char* panel, char* gradient) {
    Packer packer(g_, p_.kernels, p_.source, panel_number, band, panel);
    const int64_t height = std::min(g_.band, g_.y.grid() - band * g_.band);
    for (int64_t i = 0; i < height; i += g_.th) {
        const int th = int(std::min<int64_t>(g_.th, height - i));
        packer.reach(i + th);
        pack_gradient(panel_number, band * g_.band + i, th, gradient);
        const ptrdiff_t pitch = g_.row_vectors() * g_.vector;
        multiply(panel + i * g_.pitch(), GradientPanel{gradient, th * pitch, pitch}, th);
    }
}

void DotItem::add(int64_t panel_number, char* panel, const GradientPanel& gradient) {
    Packer packer(g_, p_.kernels, p_.source, panel_number, 0, panel);
    for (int64_t i = 0; i < g_.y.grid(); i += g_.th) {
        const int th = int(std::min<int64_t>(g_.th, g_.y.grid() - i));
        packer.reach(i + th);
        const char* rows = gradient.data + row_begin_ * gradient.row_pitch + i * gradient.pitch;
        multiply(panel + i * g_.pitch(), GradientPanel{rows, gradient.row_pitch, gradient.pitch}, th);
    }
}

// Grid rows [y, y + th) of the gradient: [row][th][row_vectors].
void DotItem::pack_gradient(int64_t panel_number, int64_t y, int th, char* gradient) {
    const int64_t* s = p_.gradient.strides;
    const int64_t width = g_.x.target, step = g_.groups * g_.vector, rows = row_end_ - row_begin_;
    const int64_t pitch = th * g_.row_vectors() * g_.vector;
    at_.resize(th * width);
    for (int64_t p = 0; p < th * width; ++p) at_[p] = int32_t(p * step);
    for (int64_t group = 0; group < g_.groups; ++group) {
        const int64_t image = panel_number * g_.panel_images() + group * g_.lanes();
        const int valid = int(std::clamp<int64_t>(p_.gradient.n - image, 0, g_.lanes()));
        const float* data = p_.gradient.data + (valid ? image * s[0] : 0) + row_begin_ * s[1] + y * s[2];
        char* to = gradient + group * g_.vector;
        if (s[1] == 1) {
            for (int64_t p = 0; p < th * width; ++p)
                p_.kernels.pack_channels(data + p / width * s[2] + p % width * s[3], s[0], valid, rows, s[3],
                                         to + p * step, pitch);
        } else if (s[3] == 1 && (s[2] == width || th == 1)) {
            for (int64_t row = 0; row < rows; ++row)
                p_.kernels.pack_pixels(data + row * s[1], s[0], valid, th * width, s[1], to + row * pitch,
                                       at_.data());
        } else {
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t p = 0; p < th * width; ++p)
                    p_.kernels.pack_channels(data + row * s[1] + p / width * s[2] + p % width * s[3], s[0], valid,
                                             1, 0, to + row * pitch + p * step, 0);
        }
    }
}

// Grid rows of the panel from `source` on, and the gradient's of them.
void DotItem::multiply(const char* source, const GradientPanel& gradient, int th) {
    DotArgs args{};
    args.source_pitch = g_.pitch();
    args.gradient_pitch = gradient.pitch;
    args.gradient_row = gradient.row_pitch;
    args.sum = sums_;
    for (int64_t j = 0; j < g_.row_vectors(); j += g_.tw) {
        const int tw = int(std::min<int64_t>(g_.tw, g_.row_vectors() - j));
        args.source = source + j * g_.vector;
        args.gradient = gradient.data + j * g_.vector;
        const auto kernel = g_.whole ? g_.whole->dot : p_.kernels.dot(th, tw, g_.height > 1);
        for_blocks(p_.table, row_begin_, row_end_, args, kernel);
    }
}

}  // namespace granet
