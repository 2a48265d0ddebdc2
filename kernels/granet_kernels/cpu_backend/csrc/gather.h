// What the passes over the weight share.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>
#include <utility>

#include "layout.h"
#include "panel.h"
#include "parallel.h"

namespace granet {

constexpr int64_t CHUNK = 16;  // rows whose tiles are stored together: what a channels_last store takes

// Source channels of one block, so that a tile's part of the panel stays in a cache while all rows use it.
//
// footprint: bytes of a channel that a tile reads; tile: those that one weight does; density: kept weights of a row and
// channel. Blocks for the first-level cache pay if a row has several weights in each, since its tile is loaded and
// stored once a block; more of them where each tap has a loop of its own, and fewer where there is one tap.
enum class Taps { one, together, each };
int64_t block_of(int64_t footprint, int64_t tile, int64_t channels, double density, Taps taps);

int64_t footprint_of(const Geometry& g);

// The weight's entries for a geometry, by output or by input channel.
std::shared_ptr<const Table> table_of(granet_layout* layout, const Geometry& g, bool by_output);

// values[j] = the weight of entry j.
void gather_values(const Table& table, const float* weight, float* values, int threads);

// In how many ranges to cut the rows of each of so many panels, so that the threads end together: packing is repeated
// for each.
int64_t row_splits(int64_t panels, int64_t channels, int64_t rows, int64_t nnz, int threads);

// Whether a destination of this many floats will have left the cache before it is read.
bool goes_past_cache(int64_t floats);

// kernel(args) for rows [begin, end) of each block of a table without phases, whose part of it `args` gets.
template <typename Args, typename Kernel>
void for_blocks(const Table& table, int64_t begin, int64_t end, Args& args, const Kernel& kernel) {
    args.offset = table.offset.data();
    args.rows = end - begin;
    for (int64_t block = 0; block < table.blocks; ++block) {
        args.ptr = table.row_ptr(0, block, begin);
        args.order = table.order_of(0, block, begin, end);
        if constexpr (std::is_same_v<Args, TileArgs>) args.accumulate = block > 0;
        kernel(args);
    }
}

// The destination of a pass without panels: all rows of images in memory, a chunk of rows at a time.
struct RowsPass {
    // floats: of the whole destination.
    RowsPass(std::shared_ptr<const Table> table_, const float* weight, const float* bias_, float* out_,
             const int64_t* out_strides_, int64_t floats, int threads)
        : table(std::move(table_)),
          values(table->nnz() * sizeof(float)),
          bias(bias_),
          out(out_),
          out_strides(out_strides_),
          stream(goes_past_cache(floats)),
          chunk(table->blocks == 1 ? CHUNK : table->rows) {
        gather_values(*table, weight, values.as<float>(), threads);
    }
    // kernel(args) for each block, and store(row, its finished tile), with the tiles of a chunk in args.out.
    template <typename Kernel, typename Store>
    void run(TileArgs& args, const Kernel& kernel, const Store& store) const {
        args.value = values.as<float>();
        for (int64_t begin = 0; begin < table->rows; begin += chunk) {
            const int64_t end = std::min(begin + chunk, table->rows);
            args.bias = bias ? bias + begin : nullptr;
            for_blocks(*table, begin, end, args, kernel);
            for (int64_t row = begin; row < end; ++row) store(row, args.out + (row - begin) * args.out_row);
        }
    }
    float* channel(int64_t image, int64_t row) const { return out + image * out_strides[0] + row * out_strides[1]; }

    std::shared_ptr<const Table> table;
    Scratch values;
    const float* bias;
    float* out;
    const int64_t* out_strides;
    bool stream;
    int64_t chunk;  // rows whose tiles are in memory together
};

}  // namespace granet
