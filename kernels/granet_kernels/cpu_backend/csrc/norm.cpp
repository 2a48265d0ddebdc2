// Batch norm. In NCHW each channel is read once from memory and passed over again while it lies in the cache. Images of
// few pixels, which would fill vectors in part, go several channels at a time: see norm_few.cpp.
#include "norm.h"

#include <cmath>

#include "kernels.h"
#include "parallel.h"

namespace granet {
namespace {

constexpr int64_t FEW_PIXELS = 64;    // from about here on, both ways take the same time
constexpr int64_t LEAST_IMAGES = 16;  // fewer do not pay for putting together what is found for each column

bool are_few(const granet_norm& norm) { return norm.pixels <= FEW_PIXELS && norm.n >= LEAST_IMAGES; }

Channel channel_of(const granet_norm& norm) { return Channel{norm.n, norm.c * norm.pixels, norm.pixels}; }

void norm_channels_forward(const granet_norm& norm, const float* x, const float* residual, const float* gamma,
                           const float* beta, float* y, float* mean, float* invstd, float* var, int threads) {
    const KernelSet& k = kernels();
    const Channel channel = channel_of(norm);
    const double count = count_of(norm);
    parallel_for(threads, norm.c, [&](int64_t c) {
        const float* from = x + c * norm.pixels;
        mean[c] = float(k.norm_sum(channel, from) / count);
        const double variance = k.norm_squares(channel, from, mean[c]) / count;
        var[c] = float(variance);
        invstd[c] = float(1.0 / std::sqrt(variance + norm.eps));
        const Affine a = affine(gamma[c], beta[c], mean[c], invstd[c]);
        k.norm_apply(channel, NormApply{from, residual ? residual + c * norm.pixels : nullptr, y + c * norm.pixels,
                                        a.scale, a.shift, norm.relu != 0, stream(norm)});
        k.fence();
    });
}

void norm_channels_backward(const granet_norm& norm, const float* g, const float* x, const float* y,
                            const float* gamma, const float* beta, const float* mean, const float* invstd, float* dx,
                            float* dresidual, float* dgamma, float* dbeta, int threads) {
    const KernelSet& k = kernels();
    const Channel channel = channel_of(norm);
    parallel_for(threads, norm.c, [&](int64_t c) {
        const int64_t at = c * norm.pixels;
        const Affine a = affine(gamma[c], beta[c], mean[c], invstd[c]);
        const NormGradient args{g + at,  x + at,
                                y ? y + at : nullptr, a.scale,
                                a.shift, mean[c],
                                dx + at, dresidual ? dresidual + at : nullptr,
                                norm.relu != 0,       stream(norm)};
        double sum, product;
        k.norm_gradient_sums(channel, args, &sum, &product);
        dbeta[c] = float(sum);
        dgamma[c] = float(product * double(invstd[c]));
        const Correction d = correction(a.scale, mean[c], invstd[c], sum, product, count_of(norm));
        k.norm_gradient_apply(channel, args, d.factor, d.offset);
        k.fence();
    });
}

}  // namespace
}  // namespace granet

int granet_norm_forward(const granet_norm* norm, const float* x, const float* residual, const float* gamma,
                        const float* beta, float* y, float* mean, float* invstd, float* var, int threads) {
    using namespace granet;
    return guarded([&] {
        const auto forward = norm->channels_last ? norm_rows_forward
                             : are_few(*norm)    ? norm_few_forward
                                                 : norm_channels_forward;
        forward(*norm, x, residual, gamma, beta, y, mean, invstd, var, threads);
        return GRANET_OK;
    });
}

int granet_norm_backward(const granet_norm* norm, const float* g, const float* x, const float* y, const float* gamma,
                         const float* beta, const float* mean, const float* invstd, float* dx, float* dresidual,
                         float* dgamma, float* dbeta, int threads) {
    using namespace granet;
    return guarded([&] {
        const auto backward = norm->channels_last ? norm_rows_backward
                              : are_few(*norm)    ? norm_few_backward
                                                  : norm_channels_backward;
        backward(*norm, g, x, y, gamma, beta, mean, invstd, dx, dresidual, dgamma, dbeta, threads);
        return GRANET_OK;
    });
}
