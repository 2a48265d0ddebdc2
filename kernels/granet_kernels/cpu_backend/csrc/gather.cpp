#include "gather.h"

#include <algorithm>

#include "caches.h"
#include "parallel.h"

namespace granet {
namespace {

// Measured best of 20, 24 and 28 kB for a first-level cache of 32 kB, and of 300, 450 and 600 kB for a second of 1 MB;
// with 48 kB and 2 MB the same, but where each tap has a loop of its own, and for kernels of one tap.
constexpr int64_t FIRST_LEVEL = 28 << 10, SECOND_LEVEL = 420 << 10, FITS_SECOND_LEVEL = 600 << 10;
constexpr double PART_OF_FIRST_BY_TAP = 0.875, PART_OF_FIRST_ONE_TAP = 0.8;
constexpr double FIRST_LEVEL_WEIGHTS = 5, FIRST_LEVEL_WEIGHTS_BY_TAP = 20, SECOND_LEVEL_WEIGHTS = 1.5;
// A second-level cache of this size is nearly as fast as a first: blocks for the first pay where rows read so much.
constexpr int64_t LARGE_SECOND_LEVEL = int64_t(2) << 20;
constexpr double FIRST_LEVEL_BYTES = 4608, FIRST_LEVEL_BYTES_ONE_TAP = 2560;
constexpr int64_t PAST_CACHE = int64_t(1) << 20;

int64_t equal_parts(int64_t channels, int64_t most) {
    const int64_t parts = (channels + most - 1) / most;
    return (channels + parts - 1) / parts;
}

}  // namespace

int64_t block_of(int64_t footprint, int64_t tile, int64_t channels, double density, Taps taps) {
    const bool by_tap = taps == Taps::each, one_tap = taps == Taps::one;
    const auto part_of_first = [](double part) { return int64_t(part * double(caches().first)); };
    const int64_t level = by_tap    ? part_of_first(PART_OF_FIRST_BY_TAP)
                          : one_tap ? std::max(FIRST_LEVEL, part_of_first(PART_OF_FIRST_ONE_TAP))
                                    : FIRST_LEVEL;
    double enough = by_tap ? FIRST_LEVEL_WEIGHTS_BY_TAP : FIRST_LEVEL_WEIGHTS;
    if (caches().second >= LARGE_SECOND_LEVEL)
        enough = std::max(enough, (one_tap ? FIRST_LEVEL_BYTES_ONE_TAP : FIRST_LEVEL_BYTES) / double(tile));
    const int64_t first = level / footprint, second = SECOND_LEVEL / footprint;
    if (first < channels && double(first) * density >= enough) return equal_parts(channels, first);
    if (footprint * channels > FITS_SECOND_LEVEL && double(second) * density >= SECOND_LEVEL_WEIGHTS)
        return equal_parts(channels, second);
    return channels;
}

int64_t footprint_of(const Geometry& g) {
    const int64_t height = g.th + g.y.high - g.y.low, width = g.tw + (g.x.high - g.x.low) * g.groups;
    return height * width * g.vector * g.y.source_phases * g.x.source_phases;
}

std::shared_ptr<const Table> table_of(granet_layout* layout, const Geometry& g, bool by_output) {
    const double outputs = g.y.target_phases * g.x.target_phases;
    const double density = double(layout->nnz()) / (double(g.rows * g.channels) * outputs);
    const Taps taps = g.whole ? Taps::each : g.y.shift.size() * g.x.shift.size() == 1 ? Taps::one : Taps::together;
    const int64_t block = block_of(footprint_of(g), g.th * g.tw * g.vector, g.channels, density, taps);
    return layout->table(access_of(g, by_output, block));
}

void gather_values(const Table& table, const float* weight, float* values, int threads) {
    constexpr int64_t piece = 1 << 12;
    const int64_t nnz = table.nnz();
    parallel_for(threads, (nnz + piece - 1) / piece, [&](int64_t i) {
        const int64_t end = std::min(nnz, (i + 1) * piece);
        const int32_t* position = table.position.data();
        for (int64_t j = i * piece; j < end; ++j) values[j] = weight[position[j]];
    });
}

int64_t row_splits(int64_t panels, int64_t channels, int64_t rows, int64_t nnz, int threads) {
    const double pack = 8.0 * double(channels), work = 1.0 + double(nnz) * 1.6;
    int64_t best = 1;
    double least = 0;
    for (int64_t splits = 1; splits <= std::min<int64_t>(rows, 2 * threads); ++splits) {
        const auto rounds = double((panels * splits + threads - 1) / threads);
        const double time = rounds * (pack + work / double(splits));
        if (splits == 1 || time < 0.98 * least) {
            best = splits;
            least = time;
        }
    }
    return best;
}

bool goes_past_cache(int64_t floats) { return floats >= PAST_CACHE; }

}  // namespace granet
