// 1 x 1 convolutions of images in channels_last: linear layers, of which every pixel of every image is a row.
#pragma once

#include <array>
#include <cstdint>

#include "granet_cpu.h"

namespace granet {

using Strides = std::array<int64_t, 4>;
inline Strides strides_of(const int64_t from[4]) { return {from[0], from[1], from[2], from[3]}; }

// Whether the convolution, of images of these strides, is such a layer.
template <typename... Images>
bool is_of_pixels(const granet_conv& c, const Images&... images) {
    const auto lie_in_a_row = [&](const Strides& s) {
        return s[1] == 1 && s[3] > 0 && s[2] == c.w * s[3] && s[0] == c.h * s[2];
    };
    const bool is_product = c.kh * c.kw * c.stride_h * c.stride_w == 1 && c.pad_h + c.pad_w == 0;
    return is_product && c.h * c.w > 1 && (lie_in_a_row(images) && ...);
}

// Makes pixels its images, if it is: those that a vector holds lie side by side then, and had been megabytes apart.
template <typename... Images>
void take_pixels(granet_conv& c, Images&... images) {
    if (!is_of_pixels(c, images...)) return;
    c = {c.n * c.h * c.w, c.in, 1, 1, c.out, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1};
    ((images = Strides{images[3], 1, 0, 0}), ...);
}

}  // namespace granet
