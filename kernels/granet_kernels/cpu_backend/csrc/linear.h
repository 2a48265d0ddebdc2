// Gradients of linear layers, from one walk over the weight.
#pragma once

#include "layout.h"
#include "panel.h"

namespace granet {

// Whether the gradients of a convolution are computed so: it is a linear layer, and a part of the incoming gradient fits
// in the second-level cache. Either gradient has the same bits alone as together with the other.
bool linear_applies(const KernelSet& kernels, granet_layout* layout, const granet_conv& conv);

int dgrad_linear(const KernelSet& kernels, granet_layout* layout, const granet_conv& conv, const Images& gradient,
                 const float* weight, float* dx, const int64_t dx_strides[4], int threads);

int wgrad_linear(const KernelSet& kernels, granet_layout* layout, const granet_conv& conv, const Images& gradient,
                 const Images& source, float* dw, int threads);

int backward_linear(const KernelSet& kernels, granet_layout* layout, const granet_conv& conv, const Images& gradient,
                    const Images& source, const float* weight, float* dx, const int64_t dx_strides[4], float* dw,
                    int threads);

}  // namespace granet
