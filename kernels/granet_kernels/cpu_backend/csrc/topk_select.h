// Finding the key of a given rank by narrowing a range of keys: histogram, keep the bin that holds the rank, repeat.
#pragma once

#include <cstdint>

#include "topk_scan.h"

namespace granet::topk {

// The key of the wanted rank lies in [lo, hi]; `above` keys are higher than hi.
struct Range {
    uint32_t lo, hi;
    int64_t above;

    bool exact() const { return lo == hi; }
    uint32_t width() const { return hi - lo; }

    // Bins of 2^shift keys, so that BINS of them cover the range.
    int shift() const {
        int bits = lo == hi ? 0 : 32 - __builtin_clz(width());
        return bits > BINS_LOG2 ? bits - BINS_LOG2 : 0;
    }

    // The bin in which the key of rank `count` from the top (1 is the highest) lies.
    Range narrowed(const int64_t* bins, int64_t count) const {
        const int s = shift();
        int64_t higher = above;
        int64_t bin = width() >> s;
        for (; bin > 0 && higher + bins[bin] < count; --bin) higher += bins[bin];
        const uint32_t begin = lo + (static_cast<uint32_t>(bin) << s);
        const uint32_t rest = hi - begin, last = (uint32_t{1} << s) - 1;
        return {begin, rest < last ? hi : begin + last, higher};
    }
};

// The key of rank `count` among `size` keys, of which all in the range are here. The keys are reordered.
inline Range select(uint32_t* keys, int64_t size, int64_t count, Range range) {
    while (!range.exact()) {
        int64_t bins[BINS] = {};
        const int shift = range.shift();
        for (int64_t i = 0; i < size; ++i) ++bins[(keys[i] - range.lo) >> shift];
        range = range.narrowed(bins, count);
        int64_t left = 0;
        for (int64_t i = 0; i < size; ++i) {
            const uint32_t key = keys[i];
            keys[left] = key;
            left += key - range.lo <= range.width();
        }
        size = left;
    }
    return range;
}

}  // namespace granet::topk
