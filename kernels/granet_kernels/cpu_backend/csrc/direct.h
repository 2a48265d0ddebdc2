// 1 x 1 convolutions that need no panel.
#pragma once

#include "layout.h"
#include "panel.h"

namespace granet {

// Whether the images of a convolution, of these strides, can be read and written in place, but for the pixels that a
// stride leaves out.
bool direct_applies(const KernelSet& kernels, const granet_conv& conv, const int64_t x[4], const int64_t y[4]);

// y of x (by_output), or the gradient of x of that of y.
int gather_direct(const KernelSet& kernels, granet_layout* layout, bool by_output, const granet_conv& conv,
                  const Images& source, const float* weight, const float* bias, float* out,
                  const int64_t out_strides[4], int threads);

int wgrad_direct(const KernelSet& kernels, granet_layout* layout, const granet_conv& conv, const Images& gradient,
                 const Images& source, float* dw, int threads);

// Both gradients, reading that of y once; and whether this pays.
int backward_direct(const KernelSet& kernels, granet_layout* layout, const granet_conv& conv, const Images& gradient,
                    const Images& source, const float* weight, float* dx, const int64_t dx_strides[4], float* dw,
                    int threads);
bool direct_reads_once(const KernelSet& kernels, granet_layout* layout, const granet_conv& conv, int threads);

}  // namespace granet
