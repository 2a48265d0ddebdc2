// Gradients of linear layers, from one walk over the weight.
#pragma once

#include "layout.h"
#include "panel.h"

namespace granet {

// Whether the gradients of a convolution are computed so: it is a linear layer with weights and images, its inputs do
// not share their rows, and a part of the incoming gradient fits in the second-level cache.
bool linear_applies(const KernelSet& kernels, granet_layout* layout, const granet_conv& conv);

// Either gradient has the same bits alone as together with the other.
int run_linear(const KernelSet& kernels, granet_layout* layout, const granet_conv& conv, const Gradients& wanted,
               int threads);

}  // namespace granet
