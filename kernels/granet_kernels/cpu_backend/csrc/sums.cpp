#include "sums.h"

#include <cstring>

#include "gather.h"

namespace granet {
namespace {

constexpr int64_t MAX_CHUNKS = 16;
constexpr int64_t LONGEST_ROW = 1 << 16;  // that a buffer is taken for

// Adds the chunks' sums of entries [begin, end), and writes them where the weight has them; `to` is for its element
// `first`.
void scatter(const Sums& sums, int32_t begin, int32_t end, float* to, int64_t first) {
    for (int32_t j = begin; j < end; ++j) {
        float sum = sums.data[j];
        for (int64_t chunk = 1; chunk < sums.chunks; ++chunk) sum += sums.of(chunk)[j];
        to[sums.table.position[j] - first] = sum;
    }
}

// Adds the sums of all chunks to those of the first.
void join_chunks(const Sums& sums, int threads) {
    constexpr int64_t piece = 1 << 13;
    const int64_t nnz = sums.table.nnz();
    parallel_for(threads, (nnz + piece - 1) / piece, [&](int64_t i) {
        const int64_t end = std::min(nnz, (i + 1) * piece);
        for (int64_t chunk = 1; chunk < sums.chunks; ++chunk)
            for (int64_t j = i * piece; j < end; ++j) sums.data[j] += sums.of(chunk)[j];
    });
}

// Writes the joined sums of a linear layer's outputs [begin, end), by the table's list of entries.
void scatter_listed(const Sums& sums, const granet_layout& layout, int64_t begin, int64_t end, float* to) {
    for (int64_t o = begin; o < end; ++o, to += layout.shape[1])
        for (int32_t k = layout.ptr[o]; k < layout.ptr[o + 1]; ++k)
            to[layout.index[k]] = sums.data[sums.table.entry[k]];
}

}  // namespace

// Fewer chunks where the weight is less sparse: the sums of all stay below half the dense gradient, if they are
// several. Powers of two: whatever the number of threads, they end together.
Cut cut_of(const granet_layout& layout, int64_t parts, int threads) {
    const int64_t outputs = layout.shape[0], numel = outputs * layout.shape[1] * layout.taps();
    const int64_t most = std::min(parts, std::max<int64_t>(1, numel / (2 * layout.nnz())));
    int64_t chunks = 1;
    while (2 * chunks <= std::min(most, MAX_CHUNKS)) chunks *= 2;
    return Cut{parts, chunks, std::min<int64_t>((threads + chunks - 1) / chunks, outputs)};
}

void clear(float* dw, int64_t count, int threads) {
    constexpr int64_t piece = 1 << 17;
    parallel_for(threads, (count + piece - 1) / piece, [&](int64_t i) {
        std::memset(dw + i * piece, 0, std::min(piece, count - i * piece) * sizeof(float));
    });
}

// Where each output channel's positions lie together, its kept ones are written while the zeros around them are still
// in the cache; those of a large weight in a buffer, from where all goes past the cache, which would read the memory
// that it is to write.
void write_gradient(const KernelSet& k, const Sums& sums, const granet_layout& layout, float* dw, int threads) {
    const int64_t outputs = layout.shape[0], row = layout.shape[1] * layout.taps();
    if (outputs > 1 && layout.strides[0] != row) {
        constexpr int64_t piece = 1 << 15;
        const int64_t nnz = sums.table.nnz();
        clear(dw, outputs * row, threads);
        parallel_for(threads, (nnz + piece - 1) / piece, [&](int64_t i) {
            scatter(sums, int32_t(i * piece), int32_t(std::min(nnz, (i + 1) * piece)), dw, 0);
        });
        return;
    }
    if (sums.table.access.lists_entries && sums.chunks > 1) join_chunks(sums, threads);
    const int64_t height = sums.table.access.height;
    const int64_t together = std::max<int64_t>(1, (1 << 13) / row / height) * height;  // output channels
    const bool lines = row % k.lanes == 0 && uintptr_t(dw) % (k.lanes * sizeof(float)) == 0;  // in every piece
    const bool stream = k.streams && lines && goes_past_cache(outputs * row) && row <= LONGEST_ROW;
    const int64_t items = (outputs + together - 1) / together;
    const ThreadScratch scratch(threads, stream ? items : 0, together * row * sizeof(float), 0);
    parallel_for(threads, items, [&](int64_t i) {
        const int64_t begin = i * together, end = std::min(outputs, begin + together), count = (end - begin) * row;
        const auto fill = [&](float* to) {
            std::memset(to, 0, count * sizeof(float));
            if (sums.table.access.lists_entries) return scatter_listed(sums, layout, begin, end, to);
            for (int64_t block = 0; block < sums.table.blocks; ++block) {
                const int32_t* ptr = sums.table.row_ptr(0, block, begin);
                scatter(sums, *ptr, *sums.table.row_ptr(0, block, end), to, begin * row);
            }
        };
        if (!stream) return fill(dw + begin * row);
        const ThreadScratch::Lease lease(scratch);
        fill(reinterpret_cast<float*>(lease.first()));
        k.copy(lease.first(), dw + begin * row, count / k.lanes, true);
        k.fence();
    });
}

}  // namespace granet
