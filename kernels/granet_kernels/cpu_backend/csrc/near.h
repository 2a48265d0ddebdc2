// 3 x 3 convolutions with padding 1, whose images are copied, not transposed: what a vector holds lies near each other,
// in a row of one image, where that of a panel is one pixel of many images.
#pragma once

#include "layout.h"
#include "panel.h"

namespace granet {

// Whether a convolution of images of these strides goes this way; the input gradient only with stride 1.
bool near_applies(const KernelSet& kernels, const granet_layout& layout, const granet_conv& conv, const int64_t x[4],
                  const int64_t y[4]);

// y of x (by_output), or the gradient of x of that of y.
int gather_near(const KernelSet& kernels, granet_layout* layout, bool by_output, const granet_conv& conv,
                const Images& source, const float* weight, const float* bias, float* out, const int64_t out_strides[4],
                int threads);

int wgrad_near(const KernelSet& kernels, granet_layout* layout, const granet_conv& conv, const Images& gradient,
               const Images& source, float* dw, int threads);

// Both gradients, of a convolution with stride 1, reading that of y once; and whether this pays.
int backward_near(const KernelSet& kernels, granet_layout* layout, const granet_conv& conv, const Images& gradient,
                  const Images& source, const float* weight, float* dx, const int64_t dx_strides[4], float* dw,
                  int threads);
bool near_reads_once(const granet_layout& layout, const granet_conv& conv, int threads);

}  // namespace granet
