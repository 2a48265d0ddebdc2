// Batch norm: each channel is read once from memory and passed over again while it lies in the cache.
#include <cmath>

#include "gather.h"
#include "granet_cpu.h"
#include "kernels.h"
#include "parallel.h"

namespace granet {
namespace {

Channel channel_of(const granet_norm& norm) { return Channel{norm.n, norm.c * norm.pixels, norm.pixels}; }

bool stream(const granet_norm& norm) { return goes_past_cache(norm.n * norm.c * norm.pixels); }

struct Affine {
    float scale, shift;
};

// The same floats forward and backward, so that both see the same sign before the activation.
Affine affine(float gamma, float beta, float mean, float invstd) {
    const float scale = gamma * invstd;
    return {scale, beta - mean * scale};
}

}  // namespace
}  // namespace granet

int granet_norm_forward(const granet_norm* norm, const float* x, const float* residual, const float* gamma,
                        const float* beta, float* y, float* mean, float* invstd, float* var, int threads) {
    using namespace granet;
    const KernelSet& k = kernels();
    const Channel channel = channel_of(*norm);
    const double count = double(norm->n) * double(norm->pixels);
    parallel_for(threads, norm->c, [&](int64_t c) {
        const float* from = x + c * norm->pixels;
        mean[c] = float(k.norm_sum(channel, from) / count);
        const double variance = k.norm_squares(channel, from, mean[c]) / count;
        var[c] = float(variance);
        invstd[c] = float(1.0 / std::sqrt(variance + norm->eps));
        const Affine a = affine(gamma[c], beta[c], mean[c], invstd[c]);
        k.norm_apply(channel, NormApply{from, residual ? residual + c * norm->pixels : nullptr, y + c * norm->pixels,
                                        a.scale, a.shift, norm->relu != 0, stream(*norm)});
        k.fence();
    });
    return GRANET_OK;
}

int granet_norm_backward(const granet_norm* norm, const float* g, const float* x, const float* y, const float* gamma,
                         const float* beta, const float* mean, const float* invstd, float* dx, float* dresidual,
                         float* dgamma, float* dbeta, int threads) {
    using namespace granet;
    const KernelSet& k = kernels();
    const Channel channel = channel_of(*norm);
    const double count = double(norm->n) * double(norm->pixels);
    parallel_for(threads, norm->c, [&](int64_t c) {
        const int64_t at = c * norm->pixels;
        const Affine a = affine(gamma[c], beta[c], mean[c], invstd[c]);
        const NormGradient args{g + at,  x + at,
                                y ? y + at : nullptr, a.scale,
                                a.shift, mean[c],
                                dx + at, dresidual ? dresidual + at : nullptr,
                                norm->relu != 0,      stream(*norm)};
        double sum, product;
        k.norm_gradient_sums(channel, args, &sum, &product);
        dbeta[c] = float(sum);
        dgamma[c] = float(product * double(invstd[c]));
        // dx = scale * (g - sum / count - (x - mean) * invstd^2 * product / count)
        const double factor = -double(a.scale) * double(invstd[c]) * double(invstd[c]) * product / count;
        const double offset = -double(a.scale) * sum / count - factor * double(mean[c]);
        k.norm_gradient_apply(channel, args, float(factor), float(offset));
        k.fence();
    });
    return GRANET_OK;
}
