#include "panel.h"

#include <algorithm>

namespace granet {
namespace {

constexpr int64_t PACKED_ROWS = 4;  // at a time: longer runs in memory
// A kernel of one tap reads each vector once a weight: with narrow tiles more channels stay in the first-level cache.
constexpr int64_t ONE_TAP_TILE = 4;
// Rows of few weights gain more by a panel of fewer images, which a second-level cache holds: measured better with
// AVX-512 at densities of .02 and .05, and worse at .1.
constexpr int64_t SPARSE_ONE_TAP_BYTES = 128;
constexpr double SPARSE_ONE_TAP = 0.07;
constexpr int64_t PER_WEIGHT = 6, PER_VECTOR = 5;  // the time of a weight in a panel, and of each of its vectors
constexpr int64_t MAX_PANEL = int64_t(16) << 20;  // bytes; larger ones are cut into bands

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

void set_range(Axis& axis) {
    axis.low = *std::min_element(axis.shift.begin(), axis.shift.end());
    axis.high = *std::max_element(axis.shift.begin(), axis.shift.end());
}

// The number of groups, at most `most`, that leaves the fewest lanes without an image; of equal ones the largest.
int fewest_idle(int64_t images, int64_t lanes, int most) {
    int best = 1;
    int64_t least = -1;
    for (int groups = 1; groups <= most; ++groups) {
        const int64_t size = groups * lanes, total = (images + size - 1) / size * size;
        if (least < 0 || total <= least) {
            best = groups;
            least = total;
        }
    }
    return best;
}

// Stores run along a row: a tile of several rows has whole ones.
int tile_height(int64_t rows, int tw, bool whole_rows, int largest) {
    if (!whole_rows) return 1;
    const int most = int(std::min<int64_t>(std::min(KernelSet::max_th, largest / tw), rows));
    if (most > 2 && rows % most != 0 && rows % (most - 1) == 0) return most - 1;
    return most;
}

// Whether the axis is that of a 3-wide kernel with stride 1 and padding 1, forward or back.
bool keeps_size(const Axis& axis) {
    return axis.source == axis.target && axis.source_phases == 1 && axis.target_phases == 1 && axis.shift.size() == 3 &&
           axis.low == -1 && axis.high == 1 && axis.shift[1] == 0;
}

}  // namespace

int cheapest_groups(int64_t images, int64_t lanes, int64_t pixels, int most) {
    int best = 1;
    int64_t least = -1;
    for (int groups = 1; groups <= most; ++groups) {
        const int64_t panels = (images + groups * lanes - 1) / (groups * lanes);
        const int64_t cost = panels * (PER_WEIGHT + groups * pixels * PER_VECTOR);
        if (least < 0 || cost <= least) {
            best = groups;
            least = cost;
        }
    }
    return best;
}

Axis forward_axis(int64_t source, int64_t target, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
    if (target == 1) stride = 1;  // one pixel never steps
    Axis axis{source, target, stride, 1, 0, 0, {}, {}, {}};
    for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t at = tap * dilation - padding, shift = floor_div(at, stride);
        axis.source_phase.push_back(at - shift * stride);
        axis.target_phase.push_back(0);
        axis.shift.push_back(shift);
    }
    set_range(axis);
    return axis;
}

Axis dgrad_axis(int64_t source, int64_t target, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
    if (source == 1) stride = 1;
    Axis axis{source, target, 1, stride, 0, 0, {}, {}, {}};
    for (int64_t tap = 0; tap < taps; ++tap) {
        // source pixel i of this tap meets target pixel i * stride + at = (i - shift) * stride + phase
        const int64_t at = tap * dilation - padding, up = floor_div(at, stride);
        axis.source_phase.push_back(0);
        axis.target_phase.push_back(at - up * stride);
        axis.shift.push_back(-up);
    }
    set_range(axis);
    return axis;
}

int tile_width(int64_t vectors, int largest) {
    if (vectors <= std::min(largest, 16)) return int(vectors);
    int width = std::min(largest, 16);
    for (int candidate = largest / 4 * 4; candidate >= std::min(largest, 12); candidate -= 4)
        if (vectors % candidate == 0) return candidate;
    if (vectors % width != 0)
        for (int candidate = width; candidate >= width / 2; --candidate)
            if (vectors % candidate == 0) return candidate;
    return width;
}

int64_t Geometry::panels() const { return (images + panel_images() - 1) / panel_images(); }

Geometry make_geometry(const Axis& y, const Axis& x, int64_t images, int64_t channels, int64_t rows,
                       const KernelSet& kernels, Use use, bool shares_rows, double density) {
    const int own = use == Use::tiles ? kernels.max_tile : kernels.max_dot;
    const int largest = shares_rows ? KernelSet::max_shared : own;
    const int height = shares_rows ? kernels.shared_rows : 1;
    const int64_t vector = kernels.lanes * int64_t(sizeof(float));
    Geometry g{y, x, images, channels, rows, 1, y.grid(), 1, 1, vector, height, nullptr};
    const int64_t pixels = y.grid() * x.grid();
    const bool one_tap = y.shift.size() * x.shift.size() == 1;
    const bool sparse = use == Use::tiles && density <= SPARSE_ONE_TAP;
    const int64_t of_one_tap = std::min(ONE_TAP_TILE, sparse ? SPARSE_ONE_TAP_BYTES / vector : ONE_TAP_TILE);
    const int64_t widest = std::min<int64_t>(largest, one_tap ? of_one_tap : 16);
    // Phases of a strided target lie interleaved, which leaves no place for groups.
    if (x.target_phases == 1 && y.target_phases == 1 && pixels < largest) {
        const int most = int(std::max<int64_t>(1, widest / pixels));
        g.groups = one_tap ? cheapest_groups(images, g.lanes(), pixels, most) : fewest_idle(images, g.lanes(), most);
    }
    if (keeps_size(y) && keeps_size(x) && y.source == x.source) {
        const WholeKernel* whole = kernels.find_whole(y.source, g.groups);
        if (whole && (use == Use::tiles ? whole->tile != nullptr : whole->dot != nullptr)) {
            g.whole = whole;
            g.y.low = g.y.high = g.x.low = g.x.high = 0;
        }
    }
    g.tw = g.whole ? int(g.row_vectors()) : tile_width(g.row_vectors(), largest);
    g.th = g.whole ? int(y.grid()) : tile_height(y.grid(), g.tw, g.tw == g.row_vectors(), largest);
    while (g.panel_bytes() > MAX_PANEL && g.band > g.th)
        g.band = std::max<int64_t>(g.th, (g.band + 1) / 2 / g.th * g.th);
    return g;
}

Access access_of(const Geometry& g, bool by_output, int64_t block) {
    Access access;
    access.by_output = by_output;
    access.phases = int(g.y.target_phases * g.x.target_phases);
    access.channel_pitch = g.channel_pitch();
    access.block = block;
    access.height = g.height;
    for (size_t i = 0; i < g.y.shift.size(); ++i) {
        for (size_t j = 0; j < g.x.shift.size(); ++j) {
            const int64_t source_phase = g.y.source_phase[i] * g.x.source_phases + g.x.source_phase[j];
            access.phase.push_back(int32_t(g.y.target_phase[i] * g.x.target_phases + g.x.target_phase[j]));
            if (g.whole) {
                access.by_tap = true;
                access.rank.push_back(int32_t((g.y.shift[i] + 1) * 3 + g.x.shift[j] + 1));
                access.tap_offset.push_back(0);
                continue;
            }
            access.tap_offset.push_back(int32_t(source_phase * g.phase_pitch() + (g.y.shift[i] - g.y.low) * g.pitch() +
                                                (g.x.shift[j] - g.x.low) * g.groups * g.vector));
        }
    }
    return access;
}

Packer::Packer(const Geometry& geometry, const KernelSet& kernels, const Images& images, int64_t panel, int64_t band,
               char* memory)
    : g_(geometry), k_(kernels), images_(images), first_image_(panel * geometry.panel_images()), memory_(memory) {
    const Axis &y = g_.y, &x = g_.x;
    origin_ = band * g_.band + y.low;
    first_row_ = std::clamp<int64_t>(origin_ * y.source_phases, 0, y.source);
    last_row_ = std::clamp<int64_t>((origin_ + g_.panel_h()) * y.source_phases, 0, y.source);
    next_ = first_row_;
    used_y_.assign(y.source_phases, 0);
    used_x_.assign(x.source_phases, 0);
    for (int64_t phase : y.source_phase) used_y_[phase] = 1;
    for (int64_t phase : x.source_phase) used_x_[phase] = 1;
    every_row_ = std::find(used_y_.begin(), used_y_.end(), 0) == used_y_.end();
    at_.assign((last_row_ - first_row_) * x.source, -1);
    for (int64_t r = first_row_; r < last_row_; ++r) {
        const int64_t phase_y = r % y.source_phases, row = r / y.source_phases - origin_;
        if (!used_y_[phase_y]) continue;
        for (int64_t c = 0; c < x.source; ++c) {
            const int64_t phase_x = c % x.source_phases, column = c / x.source_phases - x.low;
            if (!used_x_[phase_x] || column < 0 || column >= g_.panel_w()) continue;
            at_[(r - first_row_) * x.source + c] =
                int32_t((phase_y * x.source_phases + phase_x) * g_.phase_pitch() + row * g_.pitch() +
                        column * g_.groups * g_.vector);
        }
    }
    clear_border();
}

void Packer::clear_border() {
    const int64_t unit = g_.groups * g_.vector;
    std::vector<char> filled(g_.channel_pitch() / unit, 0);
    for (int32_t at : at_)
        if (at >= 0) filled[at / unit] = 1;
    const int64_t phases_x = g_.x.source_phases, phase = g_.phase_pitch() / unit;
    for (int64_t i = 0; i < g_.y.source_phases * phases_x; ++i)
        if (!used_y_[i / phases_x] || !used_x_[i % phases_x])
            std::fill_n(filled.begin() + i * phase, phase, char(1));
    // Runs of vectors that no pixel fills, and that taps read.
    std::vector<std::pair<int64_t, int64_t>> runs;
    const auto size = int64_t(filled.size());
    for (int64_t i = 0; i < size; ++i) {
        if (filled[i]) continue;
        const int64_t begin = i;
        while (i < size && !filled[i]) ++i;
        runs.emplace_back(begin * unit, (i - begin) * unit);
    }
    for (int64_t c = 0; c < g_.channels; ++c)
        for (const auto& [begin, bytes] : runs) std::fill_n(memory_ + c * g_.channel_pitch() + begin, bytes, char(0));
}

void Packer::reach(int64_t end) {
    const int64_t stop = std::min((origin_ + end + g_.y.high - g_.y.low) * g_.y.source_phases, last_row_);
    if (stop <= next_) return;
    const int64_t rows = std::max(stop - next_, PACKED_ROWS * g_.y.source_phases);
    const int64_t end_row = std::min(next_ + rows, last_row_);
    pack_rows(next_, end_row);
    next_ = end_row;
}

void Packer::pack_rows(int64_t begin, int64_t end) {
    const int64_t* s = images_.strides;
    const int64_t width = g_.x.source;
    for (int group = 0; group < g_.groups; ++group) {
        const int64_t image = first_image_ + group * g_.lanes();
        const int valid = int(std::clamp<int64_t>(images_.n - image, 0, g_.lanes()));
        const float* data = images_.data + (valid ? image * s[0] : 0);
        char* to = memory_ + group * g_.vector;
        if (s[3] == 1 && (width > 1 || s[1] != 1)) {
            for (int64_t c = 0; c < g_.channels; ++c)
                pack_row_of_pixels(data + c * s[1], valid, begin, end, to + c * g_.channel_pitch());
        } else {
            for (int64_t p = begin * width; p < end * width; ++p) {
                const int32_t at = at_[p - first_row_ * width];
                if (at < 0) continue;
                const float* pixel = data + p / width * s[2] + p % width * s[3];
                if (s[1] == 1) {
                    k_.pack_channels(pixel, s[0], valid, g_.channels, s[3], to + at, g_.channel_pitch());
                    continue;
                }
                for (int64_t c = 0; c < g_.channels; ++c)
                    k_.pack_channels(pixel + c * s[1], s[0], valid, 1, 0, to + at + c * g_.channel_pitch(), 0);
            }
        }
    }
}

void Packer::pack_row_of_pixels(const float* channel, int valid, int64_t begin, int64_t end, char* to) const {
    const int64_t *s = images_.strides, width = g_.x.source;
    const int32_t* at = at_.data() + (begin - first_row_) * width;
    if (s[2] == width && every_row_) {  // rows follow each other: one run of pixels
        k_.pack_pixels(channel + begin * s[2], s[0], valid, (end - begin) * width, s[1], to, at);
        return;
    }
    for (int64_t r = begin; r < end; ++r, at += width)
        if (used_y_[r % g_.y.source_phases]) k_.pack_pixels(channel + r * s[2], s[0], valid, width, s[1], to, at);
}

void unpack(const KernelSet& kernels, const char* vectors, const Region& region, int64_t row_begin, int64_t row_end,
            float* images, const int64_t strides[4], int64_t n, int64_t h, int64_t w, bool stream) {
    const int64_t rows = row_end - row_begin, lanes = region.vector / int64_t(sizeof(float));
    const int64_t height = std::min(region.height, h - region.y), width = std::min(region.width, w - region.x);
    const int64_t step = region.groups * region.vector;
    for (int64_t group = 0; group < region.groups; ++group) {
        const int64_t image = region.image + group * lanes;
        const int valid = int(std::clamp<int64_t>(n - image, 0, lanes));
        if (valid == 0) break;
        const int64_t corner = region.y * strides[2] + region.x * strides[3];
        float* to = images + image * strides[0] + row_begin * strides[1] + corner;
        const char* from = vectors + group * region.vector;
        if (strides[1] == 1) {
            for (int64_t i = 0; i < height; ++i)
                for (int64_t j = 0; j < width; ++j)
                    kernels.unpack(from + (i * region.width + j) * step, region.bytes(),
                                   to + i * strides[2] + j * strides[3], strides[0], valid, rows, stream);
        } else if (width == region.width && strides[2] == width) {
            for (int64_t row = 0; row < rows; ++row)
                kernels.unpack(from + row * region.bytes(), step, to + row * strides[1], strides[0], valid,
                               height * width, stream);
        } else {
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t i = 0; i < height; ++i)
                    kernels.unpack(from + row * region.bytes() + i * region.width * step, step,
                                   to + row * strides[1] + i * strides[2], strides[0], valid, width, stream);
        }
    }
}

}  // namespace granet
