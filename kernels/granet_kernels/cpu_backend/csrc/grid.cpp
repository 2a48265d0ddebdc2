#include "grid.h"

#include <algorithm>
#include <cstring>

namespace granet {
namespace {

constexpr int64_t LINE = 16;  // floats of a cache line

}  // namespace

void Grid::take(const KernelSet& k, const float* channel, ptrdiff_t next, float* to) const {
    for (int64_t i = 0; i < rows; ++i, channel += row, to += columns) {
        for (int64_t j = 0; j < width; j += LINE) __builtin_prefetch(channel + next + j);
        if (fills_vectors(k))
            k.take_second(channel, std::min(width, 2 * columns), to, nullptr);
        else
            for (int64_t j = 0; j < columns; ++j) to[j] = channel[j * column];
    }
}

void Grid::put(const KernelSet& k, const float* from, float* channel) const {
    for (int64_t i = 0; i < rows; ++i, channel += row, from += columns) {
        if (fills_vectors(k))
            k.put_second(from, std::min(width, 2 * columns), channel);
        else
            for (int64_t j = 0; j < columns; ++j) channel[j * column] = from[j];
    }
}

void Grid::put_part(const float* from, int64_t first, int64_t count, float* channel) const {
    if (first == 0) std::memset(channel, 0, size_t(image()) * sizeof(float));
    int64_t y = first / columns, x = first % columns;
    for (int64_t i = 0; i < count; ++i) {
        channel[y * row + x * column] = from[i];
        if (++x == columns) {
            x = 0;
            ++y;
        }
    }
}

Grid grid_of(const granet_conv& c) { return {c.out_h, c.out_w, c.stride_h * c.w, c.stride_w, c.w, c.h}; }

}  // namespace granet
