// 1 x 1 convolutions that need no panel.
#pragma once

#include "layout.h"
#include "panel.h"

namespace granet {

// Whether source and target of a convolution, images of these strides, can be read and written in place.
bool direct_applies(const KernelSet& kernels, const granet_conv& conv, const int64_t source[4],
                    const int64_t target[4]);

int gather_direct(const KernelSet& kernels, granet_layout* layout, bool by_output, int64_t rows, int64_t channels,
                  int64_t pixels, const Images& source, const float* weight, const float* bias, float* out,
                  const int64_t out_strides[4], int threads);

// Adds the gradient of rows [row_begin, row_end) that images [image_begin, image_end) give. The table has the access
// that wgrad_direct_access names.
struct Part {
    int64_t row_begin, row_end, image_begin, image_end;
};
void wgrad_direct(const KernelSet& kernels, const Table& table, const Images& gradient, const Images& source,
                  int64_t pixels, const Part& part, float* sums);
Access wgrad_direct_access(const KernelSet& kernels, const granet_conv& conv, int64_t channel_stride,
                           granet_layout* layout);

}  // namespace granet
