// The index of one mask, and the tables made from it for one geometry.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "granet_cpu.h"
#include "kernels.h"

namespace granet {

// How a pass over the weight addresses its source. Equal keys have equal tables.
//
// A forward pass walks the weight by output channel (`by_output`), an input gradient by input channel. Each kept weight
// becomes an entry of the destination phase `phase[tap]`, at byte offset channel * channel_pitch + tap_offset[tap].
struct Access {
    bool by_output = true;
    int phases = 1;
    int64_t channel_pitch = 0;
    int64_t block = 0;  // source channels in a block; entries are ordered by phase, block, row
    std::vector<int32_t> phase, tap_offset;
    int height = 1;                  // rows that share their entries, see granet_layout::shares_rows
    bool by_tap = false;             // entries of a row are ordered by rank[tap], which row_ptr tells apart
    std::vector<int32_t> rank;
    bool lists_entries = false;      // of a kernel of one tap, in one block

    bool operator==(const Access& o) const {
        return by_output == o.by_output && phases == o.phases && channel_pitch == o.channel_pitch && block == o.block &&
               phase == o.phase && tap_offset == o.tap_offset && height == o.height && by_tap == o.by_tap &&
               rank == o.rank && lists_entries == o.lists_entries;
    }
};

// Row r of block b of phase p owns the entries [ptr[0], ptr[1]) with ptr = row_ptr(p, b, r); by tap, those of rank t
// are [ptr[t], ptr[t + 1]). With shared rows, the first of them owns the entries of all, and the others none: entry j
// belongs to row j % height of them and has offset[j / height].
struct Table {
    Access access;
    int64_t rows = 0, blocks = 1, ranks = 1;
    std::vector<int32_t> ptr;
    std::vector<int32_t> offset;    // bytes into the source
    std::vector<int32_t> position;  // elements into the weight, by its strides
    std::vector<int32_t> entry;     // of each kept weight in the order of the layout's index, if the access lists them
    std::vector<uint8_t> order;     // of the rows of each block, as TileArgs has it; empty where rows are long

    const int32_t* row_ptr(int64_t phase, int64_t b, int64_t row) const {
        return ptr.data() + ((phase * blocks + b) * rows + row) * ranks;
    }
    // In which order to take the rows [begin, end), or NULL: as they come. Only whole groups have one.
    const uint8_t* order_of(int64_t phase, int64_t b, int64_t begin, int64_t end) const {
        const bool whole_groups = begin % ORDERED == 0 && (end % ORDERED == 0 || end == rows);
        return order.empty() || !whole_groups ? nullptr : order.data() + (phase * blocks + b) * rows + begin;
    }
    int64_t nnz() const { return int64_t(position.size()); }
};

}  // namespace granet

struct granet_layout {
    int64_t shape[4], strides[4];
    std::vector<int32_t> ptr;    // (out + 1,)
    std::vector<int32_t> index;  // channel * taps + tap of each kept weight, row by row, rising

    std::shared_ptr<const granet::Table> table(const granet::Access& access);
    // Whether the rows of a 1 x 1 kernel, by output or input channel, have the same entries in each group of `height`.
    bool shares_rows(bool by_output, int height);
    int64_t taps() const { return shape[2] * shape[3]; }
    int64_t nnz() const { return int64_t(index.size()); }
    double density() const { return double(nnz()) / (double(shape[0]) * double(shape[1]) * double(taps())); }

    std::shared_ptr<const granet::Table> find(const granet::Access& access);
    std::vector<std::shared_ptr<const granet::Table>> tables;  // most recently made last
    struct Shared {
        bool by_output;
        int height;
        bool shares;
    };
    std::vector<Shared> shared;  // what shares_rows has found
};
