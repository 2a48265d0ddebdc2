// Batch norm: what the drivers of the two formats share.
#pragma once

#include "gather.h"
#include "granet_cpu.h"

namespace granet {

struct Affine {
    float scale, shift;
};

// The same floats forward and backward, so that both see the same sign before the activation. A shift of many times the
// spread of x is rounded once only.
inline Affine affine(float gamma, float beta, float mean, float invstd) {
    const float scale = gamma * invstd;
    return {scale, float(double(beta) - double(mean) * double(scale))};
}

inline double count_of(const granet_norm& norm) { return double(norm.n) * double(norm.pixels); }

inline bool stream(const granet_norm& norm) { return goes_past_cache(norm.n * norm.c * norm.pixels); }

// dx = scale * (g - sum / count - (x - mean) * invstd^2 * product / count) = scale * g + factor * x + offset, where sum
// is that of g, and product that of g * (x - mean).
struct Correction {
    float factor, offset;
};
inline Correction correction(float scale, float mean, float invstd, double sum, double product, double count) {
    const double factor = -double(scale) * double(invstd) * double(invstd) * product / count;
    return {float(factor), float(-double(scale) * sum / count - factor * double(mean))};
}

// The functions of granet_cpu.h for images in channels_last, and for images of few pixels in NCHW. They may throw
// std::bad_alloc.
void norm_rows_forward(const granet_norm& norm, const float* x, const float* residual, const float* gamma,
                       const float* beta, float* y, float* mean, float* invstd, float* var, int threads);
void norm_rows_backward(const granet_norm& norm, const float* g, const float* x, const float* y, const float* gamma,
                        const float* beta, const float* mean, const float* invstd, float* dx, float* dresidual,
                        float* dgamma, float* dbeta, int threads);

void norm_few_forward(const granet_norm& norm, const float* x, const float* residual, const float* gamma,
                      const float* beta, float* y, float* mean, float* invstd, float* var, int threads);
void norm_few_backward(const granet_norm& norm, const float* g, const float* x, const float* y, const float* gamma,
                       const float* beta, const float* mean, const float* invstd, float* dx, float* dresidual,
                       float* dgamma, float* dbeta, int threads);

}  // namespace granet
