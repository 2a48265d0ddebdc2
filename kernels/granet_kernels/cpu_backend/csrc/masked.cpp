// Dense weights and gradients under their masks.
#include <algorithm>
#include <atomic>

#include "granet_cpu.h"
#include "kernels.h"
#include "parallel.h"

namespace {

constexpr int64_t PIECE = int64_t(1) << 16;  // values, about what is worth a thread

template <typename F>
void for_pieces(int64_t count, int threads, const F& f) {
    granet::parallel_for(threads, (count + PIECE - 1) / PIECE,
                         [&](int64_t i) { f(i * PIECE, std::min(PIECE, count - i * PIECE)); });
}

}  // namespace

int granet_is_zero_off(int64_t count, const float* values, const unsigned char* mask, int threads) {
    const granet::KernelSet& k = granet::kernels();
    std::atomic<bool> is_zero{true};
    for_pieces(count, threads, [&](int64_t begin, int64_t size) {
        if (is_zero.load(std::memory_order_relaxed) && !k.is_zero_off(values + begin, mask + begin, size))
            is_zero.store(false, std::memory_order_relaxed);
    });
    return is_zero.load();
}

int granet_mask_values(int64_t count, const float* values, const unsigned char* mask, float* to, int threads) {
    const granet::KernelSet& k = granet::kernels();
    for_pieces(count, threads, [&](int64_t begin, int64_t size) {
        k.mask_values(values + begin, mask + begin, size, to + begin);
    });
    return GRANET_OK;
}
