// Which pixels of its input a 1 x 1 convolution reads.
#pragma once

#include <cstdint>

#include "granet_cpu.h"
#include "kernels.h"

namespace granet {

struct Grid {
    int64_t rows, columns;   // of the pixels that count
    int64_t row, column;     // from one to the next, in the image
    int64_t width, height;   // of the image

    int64_t pixels() const { return rows * columns; }
    int64_t image() const { return width * height; }
    bool has_all() const { return pixels() == image(); }
    bool fills_vectors(const KernelSet& k) const { return column == 2 && columns >= k.lanes; }

    // The pixels that count, of a channel, one behind the other. next: how far the channel lies that is prefetched.
    void take(const KernelSet& kernels, const float* channel, ptrdiff_t next, float* to) const;
    // Their way back into a channel whose other pixels are zero.
    void put(const KernelSet& kernels, const float* from, float* channel) const;
    // Pixels [first, first + count) alone; with the first of all, what is no pixel of the grid is cleared.
    void put_part(const float* from, int64_t first, int64_t count, float* channel) const;
};
Grid grid_of(const granet_conv& conv);

}  // namespace granet
