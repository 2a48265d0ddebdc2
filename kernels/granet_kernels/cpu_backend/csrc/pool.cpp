#include <algorithm>

#include "granet_cpu.h"
#include "kernels.h"
#include "parallel.h"

namespace {

// Calls f(first plane, h) for ranges of planes that are large enough to be worth a thread. Planes of an even height are
// one image of so many rows: a kernel finds more rows to take at once.
template <typename F>
void for_planes(int64_t planes, int64_t h, int64_t w, int threads, const F& f) {
    const int64_t piece = std::max<int64_t>(1, (int64_t(1) << 16) / std::max<int64_t>(h * w, 1));
    granet::parallel_for(threads, (planes + piece - 1) / piece, [&](int64_t i) {
        const int64_t begin = i * piece, end = std::min(planes, begin + piece);
        const int64_t together = h % 2 ? 1 : end - begin;
        for (int64_t plane = begin; plane < end; plane += together) f(plane, together * h);
    });
}

}  // namespace

int granet_pool_forward(int64_t planes, int64_t h, int64_t w, const float* x, float* y, unsigned char* which,
                        int threads) {
    const granet::KernelSet& k = granet::kernels();
    const int64_t outputs = (h / 2) * (w / 2);
    for_planes(planes, h, w, threads, [&](int64_t p, int64_t height) {
        k.pool(x + p * h * w, height, w, y + p * outputs, which + p * outputs);
    });
    return GRANET_OK;
}

int granet_pool_backward(int64_t planes, int64_t h, int64_t w, const float* g, const unsigned char* which, float* dx,
                         int threads) {
    const granet::KernelSet& k = granet::kernels();
    const int64_t outputs = (h / 2) * (w / 2);
    for_planes(planes, h, w, threads, [&](int64_t p, int64_t height) {
        k.pool_gradient(g + p * outputs, which + p * outputs, height, w, dx + p * h * w);
    });
    return GRANET_OK;
}
