#include <algorithm>

#include "granet_cpu.h"
#include "kernels.h"
#include "parallel.h"

namespace {

// Calls f for ranges of planes that are large enough to be worth a thread.
template <typename F>
void for_planes(int64_t planes, int64_t pixels, int threads, const F& f) {
    const int64_t piece = std::max<int64_t>(1, (int64_t(1) << 16) / std::max<int64_t>(pixels, 1));
    granet::parallel_for(threads, (planes + piece - 1) / piece, [&](int64_t i) {
        for (int64_t plane = i * piece; plane < std::min(planes, (i + 1) * piece); ++plane) f(plane);
    });
}

}  // namespace

int granet_pool_forward(int64_t planes, int64_t h, int64_t w, const float* x, float* y, unsigned char* which,
                        int threads) {
    const granet::KernelSet& k = granet::kernels();
    const int64_t outputs = (h / 2) * (w / 2);
    for_planes(planes, h * w, threads,
               [&](int64_t p) { k.pool(x + p * h * w, h, w, y + p * outputs, which + p * outputs); });
    return GRANET_OK;
}

int granet_pool_backward(int64_t planes, int64_t h, int64_t w, const float* g, const unsigned char* which, float* dx,
                         int threads) {
    const granet::KernelSet& k = granet::kernels();
    const int64_t outputs = (h / 2) * (w / 2);
    for_planes(planes, h * w, threads,
               [&](int64_t p) { k.pool_gradient(g + p * outputs, which + p * outputs, h, w, dx + p * h * w); });
    return GRANET_OK;
}
