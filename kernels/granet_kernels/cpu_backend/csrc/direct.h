// 1 x 1 convolutions that need no panel.
#pragma once

#include <vector>

#include "layout.h"
#include "panel.h"

namespace granet {

// Whether the images of a convolution, of these strides, can be read and written in place, but for the pixels that a
// stride leaves out.
bool direct_applies(const KernelSet& kernels, const granet_conv& conv, const int64_t x[4], const int64_t y[4]);

// Which pixels of x a convolution reads.
struct Grid {
    int64_t pixels, image;    // how many, and those of a channel of x
    std::vector<int32_t> at;  // where each lies in x; empty: all, one behind the other

    bool has_all() const { return at.empty(); }
};
Grid grid_of(const granet_conv& conv);

// y of x (by_output), or the gradient of x of that of y.
int gather_direct(const KernelSet& kernels, granet_layout* layout, bool by_output, const granet_conv& conv,
                  const Images& source, const float* weight, const float* bias, float* out,
                  const int64_t out_strides[4], int threads);

// Adds the gradient of rows [row_begin, row_end) that images [image_begin, image_end) give. The table has the access
// that wgrad_direct_access names.
struct Part {
    int64_t row_begin, row_end, image_begin, image_end;
};
void wgrad_direct(const KernelSet& kernels, const Table& table, const Grid& grid, const Images& gradient,
                  const Images& source, int64_t channels, const Part& part, float* sums);
Access wgrad_direct_access(const KernelSet& kernels, const granet_conv& conv, const Grid& grid, int64_t channel_stride,
                           granet_layout* layout);

}  // namespace granet
