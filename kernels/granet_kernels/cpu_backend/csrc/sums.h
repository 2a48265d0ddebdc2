// Sums of a weight gradient's kept entries over the images.
//
// The images are cut into chunks whose number depends on the shapes alone, each chunk sums in a buffer of its own, and
// the buffers are added in order: the same bits whatever the number of threads.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "layout.h"
#include "parallel.h"

namespace granet {

// The sums of all chunks, for a table: chunk by chunk, entry by entry.
struct Sums {
    const Table& table;
    int64_t chunks;
    float* data;

    float* of(int64_t chunk) const { return data + chunk * table.nnz(); }
    void clear(int64_t chunk, int64_t row_begin, int64_t row_end) const {
        for (int64_t block = 0; block < table.blocks; ++block) {
            const int32_t begin = *table.row_ptr(0, block, row_begin), end = *table.row_ptr(0, block, row_end);
            std::fill(of(chunk) + begin, of(chunk) + end, 0.0f);
        }
    }
};

// Of `parts` of the images, for a weight of `numel` positions.
int64_t chunk_count(int64_t parts, int64_t numel, int64_t nnz);

void clear(float* dw, int64_t count, int threads);

// The gradient of all positions.
void write_gradient(const KernelSet& k, const Sums& sums, const granet_layout& layout, float* dw, int threads);

// Cuts `parts` into chunks, and the rows into as many ranges as the threads ask for, and calls
// work(row_begin, row_end, begin, end, sums) for each.
template <typename Work>
void sum_chunks(const KernelSet& k, const granet_layout& layout, const Table& table, int64_t parts, float* dw,
                int threads, const Work& work) {
    const int64_t outputs = layout.shape[0];
    const int64_t chunks = chunk_count(parts, outputs * layout.shape[1] * layout.taps(), table.nnz());
    const int64_t splits = std::min<int64_t>((threads + chunks - 1) / chunks, outputs);
    const Scratch memory(chunks * table.nnz() * sizeof(float));
    const Sums sums{table, chunks, memory.as<float>()};
    parallel_for(threads, chunks * splits, [&](int64_t item) {
        const int64_t chunk = item / splits, split = item % splits;
        const int64_t height = table.access.height, groups = outputs / height;
        const int64_t row_begin = groups * split / splits * height, row_end = groups * (split + 1) / splits * height;
        sums.clear(chunk, row_begin, row_end);
        work(row_begin, row_end, parts * chunk / chunks, parts * (chunk + 1) / chunks, sums.of(chunk));
    });
    write_gradient(k, sums, layout, dw, threads);
}

}  // namespace granet
