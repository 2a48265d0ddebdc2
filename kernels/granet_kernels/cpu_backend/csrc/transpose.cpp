// Images from NCHW to channels_last and back: matrices of channels and pixels, transposed one by one.
#include <algorithm>

#include "gather.h"
#include "granet_cpu.h"
#include "kernels.h"
#include "parallel.h"

int granet_transpose(int64_t n, int64_t rows, int64_t columns, const float* from, float* to, int threads) {
    using namespace granet;
    const KernelSet& k = kernels();
    // Pieces whose reads and writes stay in a first-level cache, and full vectors.
    const int64_t fitting = (int64_t(1) << 12) / std::max<int64_t>(rows, 1) / k.lanes * k.lanes;
    const int64_t piece = std::max<int64_t>(k.lanes, fitting), pieces = (columns + piece - 1) / piece;
    const int64_t together = std::max<int64_t>(1, (1 << 14) / (rows * piece + 1));
    const int64_t all = n * pieces;
    const bool stream = goes_past_cache(n * rows * columns);
    return guarded([&] {
        parallel_for(threads, (all + together - 1) / together, [&](int64_t item) {
            for (int64_t i = item * together; i < std::min(all, (item + 1) * together); ++i) {
                const int64_t matrix = i / pieces * rows * columns, begin = i % pieces * piece;
                k.transpose(from + matrix + begin, columns, rows, std::min(piece, columns - begin),
                            to + matrix + begin * rows, rows, stream);
            }
            k.fence();
        });
        return GRANET_OK;
    });
}
