// The inner part of forward passes and input gradients: one panel and band, each destination pixel from the sources
// that its row's weights name.
#pragma once

#include <memory>

#include "gather.h"
#include "panel.h"

namespace granet {

struct TilePass {
    Geometry geometry;
    const KernelSet& kernels;
    std::shared_ptr<const Table> table;
    const float* values;
    const float* bias;
    Images source;
    float* out;
    const int64_t* out_strides;
    int64_t splits;  // of the rows: more items where there are few panels
    bool stream;     // the destination is larger than what a cache keeps until it is read

    int64_t items() const { return geometry.panels() * geometry.bands() * splits; }
    int64_t vectors_bytes() const {  // of the tiles of as many rows as are written at a time
        return (table->blocks == 1 ? CHUNK : geometry.rows) * geometry.region_bytes();
    }
};

// Packs a panel and band into `panel`, of geometry.panel_bytes(), and computes a range of its rows. `vectors`: of
// vectors_bytes().
void run_tiles(const TilePass& pass, int64_t item, char* panel, char* vectors);

}  // namespace granet
