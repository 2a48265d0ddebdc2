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

// How the work on `parts` of the images is cut: into chunks of parts, and each into ranges of rows, as many as the
// threads ask for.
struct Cut {
    int64_t parts, chunks, splits;
    int64_t items() const { return chunks * splits; }
};
Cut cut_of(const granet_layout& layout, int64_t parts, int threads);
// Whether threads that take whole chunks end at about the same time: to read a gradient once saves 15 % at best.
inline bool is_even(const Cut& cut, int threads) {
    const int64_t rounds = (cut.chunks + threads - 1) / threads;
    return cut.splits == 1 && 8 * rounds * threads <= 9 * cut.chunks;
}

void clear(float* dw, int64_t count, int threads);

// The gradient of all positions.
void write_gradient(const KernelSet& k, const Sums& sums, const granet_layout& layout, float* dw, int threads);

// Calls work(row_begin, row_end, begin, end, sums) for each item, and writes the gradient.
template <typename Work>
void sum_chunks(const KernelSet& k, const granet_layout& layout, const Table& table, const Cut& cut, float* dw,
                int threads, const Work& work) {
    const Scratch memory(cut.chunks * table.nnz() * sizeof(float));
    const Sums sums{table, cut.chunks, memory.as<float>()};
    parallel_for(threads, cut.items(), [&](int64_t item) {
        const int64_t chunk = item / cut.splits, split = item % cut.splits;
        const int64_t height = table.access.height, groups = table.rows / height;
        const int64_t begin = groups * split / cut.splits * height, end = groups * (split + 1) / cut.splits * height;
        sums.clear(chunk, begin, end);
        work(begin, end, cut.parts * chunk / cut.chunks, cut.parts * (chunk + 1) / cut.chunks, sums.of(chunk));
    });
    write_gradient(k, sums, layout, dw, threads);
}

}  // namespace granet
