// What the passes over the weight share.
#pragma once

#include <memory>

#include "layout.h"
#include "panel.h"

namespace granet {

constexpr int64_t CHUNK = 16;  // rows whose tiles are stored together: what a channels_last store takes

// Source channels of one block, so that a tile's part of the panel stays in a cache while all rows use it.
//
// footprint: bytes of a channel that a tile reads; tile: those that one weight does; density: kept weights of a row and
// channel. Blocks for the first-level cache pay if a row has several weights in each, since its tile is loaded and
// stored once a block; more of them where each tap has a loop of its own.
int64_t block_of(int64_t footprint, int64_t tile, int64_t channels, double density, bool by_tap);

int64_t footprint_of(const Geometry& g);

// The weight's entries for a geometry, by output or by input channel.
std::shared_ptr<const Table> table_of(granet_layout* layout, const Geometry& g, bool by_output);

// values[j] = the weight of entry j.
void gather_values(const Table& table, const float* weight, float* values, int threads);

// Whether a destination of this many floats will have left the cache before it is read.
bool goes_past_cache(int64_t floats);

}  // namespace granet
