// The loops of topk_scan.h, written so that GCC vectorises them for the target of the file that includes this one.
// Nothing of the standard library is used in here: its inline functions must not be compiled for a special target.

namespace {

using granet::topk::BINS;
using granet::topk::CHUNK;
using granet::topk::Counts;
using granet::topk::Scan;
using granet::topk::Slice;

typedef uint32_t Bits __attribute__((may_alias, aligned(1)));
typedef uint64_t Word __attribute__((may_alias));

constexpr int64_t BLOCK = 64;

template <bool absolute>
inline __attribute__((always_inline)) uint32_t key_of(uint32_t bits) {
    uint32_t magnitude = bits & 0x7fffffffu;
    if constexpr (absolute) return magnitude > 0x7f800000u ? 0x7fc00000u : magnitude;
    uint32_t key = bits >> 31 ? 0x80000000u - magnitude : 0x80000000u + magnitude;
    return magnitude > 0x7f800000u ? 0xffc00000u : key;
}

template <bool absolute>
uint32_t key_of_score(float score) {
    uint32_t bits;
    __builtin_memcpy(&bits, &score, sizeof bits);
    return key_of<absolute>(bits);
}

// One block: its mask bytes, and a byte per score that says whether it is a candidate.
template <bool absolute, bool all>
inline __attribute__((always_inline)) int bracket_block(const Bits* bits, const unsigned char* eligible, int64_t size,
                                                        uint32_t lo, uint32_t hi, unsigned char* __restrict mask,
                                                        unsigned char* __restrict candidate) {
    unsigned char above = 0;
    for (int64_t i = 0; i < size; ++i) {
        uint32_t key = key_of<absolute>(bits[i]);
        unsigned char e = all ? 1 : eligible[i] != 0;
        unsigned char over = (key > hi) & e;
        candidate[i] = ((key >= lo) & e) ^ over;
        mask[i] = over;
        above += over;
    }
    return above;
}

template <bool absolute, bool all>
Counts bracket_loop(const Slice& slice, uint32_t lo, uint32_t hi, uint32_t* keys, uint16_t* indices) {
    const Bits* bits = reinterpret_cast<const Bits*>(slice.scores);
    alignas(64) unsigned char candidate[BLOCK] = {};
    int64_t above = 0, found = 0;
    for (int64_t begin = 0; begin < slice.size; begin += BLOCK) {
        const unsigned char* eligible = all ? nullptr : slice.eligible + begin;
        if (slice.size - begin >= BLOCK) {
            above += bracket_block<absolute, all>(bits + begin, eligible, BLOCK, lo, hi, slice.mask + begin, candidate);
        } else {
            __builtin_memset(candidate, 0, BLOCK);
            above += bracket_block<absolute, all>(bits + begin, eligible, slice.size - begin, lo, hi,
                                                  slice.mask + begin, candidate);
        }
        for (int64_t w = 0; w < BLOCK / 8; ++w) {
            uint64_t word = reinterpret_cast<const Word*>(candidate)[w];
            for (; word; word &= word - 1) {
                int64_t i = begin + w * 8 + (__builtin_ctzll(word) >> 3);
                keys[found] = key_of<absolute>(bits[i]);
                indices[found++] = static_cast<uint16_t>(i);
            }
        }
    }
    return {above, found};
}

template <bool absolute, bool all>
Counts count_loop(const Slice& slice, uint32_t threshold) {
    const Bits* bits = reinterpret_cast<const Bits*>(slice.scores);
    uint32_t above = 0, equal = 0;
    for (int64_t i = 0; i < slice.size; ++i) {
        uint32_t key = key_of<absolute>(bits[i]);
        uint32_t e = all ? 1 : slice.eligible[i] != 0;
        above += (key > threshold) & e;
        equal += (key == threshold) & e;
    }
    return {above, equal};
}

template <bool absolute, bool all>
void write_loop(const Slice& slice, uint32_t least) {
    const Bits* bits = reinterpret_cast<const Bits*>(slice.scores);
    unsigned char* __restrict mask = slice.mask;
    for (int64_t i = 0; i < slice.size; ++i) {
        unsigned char e = all ? 1 : slice.eligible[i] != 0;
        mask[i] = (key_of<absolute>(bits[i]) >= least) & e;
    }
}

// Several copies of the bins: runs of equal keys would otherwise wait for their own stores.
template <bool absolute, bool all>
void histogram_loop(const Slice& slice, uint32_t lo, uint32_t hi, int shift, int64_t* bins) {
    const Bits* bits = reinterpret_cast<const Bits*>(slice.scores);
    constexpr int COPIES = 4;
    alignas(64) uint32_t local[COPIES][BINS + 1] = {};  // the last bin takes what is out of range
    const uint32_t width = hi - lo;
    int64_t i = 0;
    auto bin = [&](int64_t at) -> uint32_t {
        uint32_t distance = key_of<absolute>(bits[at]) - lo;
        bool in = distance <= width && (all || slice.eligible[at]);
        return in ? distance >> shift : BINS;
    };
    for (; i + COPIES <= slice.size; i += COPIES) {
        for (int c = 0; c < COPIES; ++c) ++local[c][bin(i + c)];
    }
    for (; i < slice.size; ++i) ++local[0][bin(i)];
    for (int64_t b = 0; b < BINS; ++b) {
        int64_t sum = 0;
        for (int c = 0; c < COPIES; ++c) sum += local[c][b];
        bins[b] += sum;
    }
}

template <bool absolute>
Counts bracket(const Slice& s, uint32_t lo, uint32_t hi, uint32_t* keys, uint16_t* indices) {
    return s.eligible ? bracket_loop<absolute, false>(s, lo, hi, keys, indices)
                      : bracket_loop<absolute, true>(s, lo, hi, keys, indices);
}

template <bool absolute>
Counts count(const Slice& s, uint32_t threshold) {
    return s.eligible ? count_loop<absolute, false>(s, threshold) : count_loop<absolute, true>(s, threshold);
}

template <bool absolute>
void write(const Slice& s, uint32_t least) {
    s.eligible ? write_loop<absolute, false>(s, least) : write_loop<absolute, true>(s, least);
}

template <bool absolute>
void histogram(const Slice& s, uint32_t lo, uint32_t hi, int shift, int64_t* bins) {
    s.eligible ? histogram_loop<absolute, false>(s, lo, hi, shift, bins)
               : histogram_loop<absolute, true>(s, lo, hi, shift, bins);
}

template <bool absolute>
constexpr Scan table = {bracket<absolute>, count<absolute>, write<absolute>, histogram<absolute>,
                        key_of_score<absolute>};

}  // namespace
