// The loops of the top-k over one chunk of scores, one table of them per instruction set.
//
// A score's key is a uint32 in the order of the scores: -inf < ... < -0 == +0 < ... < inf < NaN. Keys are compared as
// integers, so denormals count whatever the floating-point environment flushes.
#pragma once

#include <cstdint>

namespace granet::topk {

constexpr int64_t CHUNK = 1 << 16;  // scores; an index within a chunk fits 16 bits
constexpr int BINS_LOG2 = 11;
constexpr int64_t BINS = 1 << BINS_LOG2;
constexpr uint32_t KEY_MAX = UINT32_MAX;  // above the key of every score

struct Slice {
    const float* scores;
    const unsigned char* eligible;  // nullptr: all
    unsigned char* mask;
    int64_t size;  // <= CHUNK
};

struct Counts {
    int64_t above;
    int64_t equal;
};

struct Scan {
    // mask = key > hi. The keys in [lo, hi], counted in `equal`, and their indices go to `keys` and `indices`, which
    // have room for CHUNK.
    Counts (*bracket)(const Slice&, uint32_t lo, uint32_t hi, uint32_t* keys, uint16_t* indices);
    // How many keys are above the threshold, and how many equal it.
    Counts (*count)(const Slice&, uint32_t threshold);
    // mask = key >= least.
    void (*write)(const Slice&, uint32_t least);
    // Adds the keys in [lo, hi] to bins[(key - lo) >> shift].
    void (*histogram)(const Slice&, uint32_t lo, uint32_t hi, int shift, int64_t* bins);
    uint32_t (*key)(float score);
};

// Of the instruction set that runs now.
const Scan& scan(bool absolute);

const Scan& scan_portable(bool absolute);
const Scan& scan_avx2(bool absolute);
const Scan& scan_avx512(bool absolute);

}  // namespace granet::topk
