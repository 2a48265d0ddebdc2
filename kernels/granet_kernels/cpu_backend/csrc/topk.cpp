// granet_topk_mask: exact, whatever the number of threads and the instruction set, in one pass over the scores.
//
// A sample brackets the key of the last selected score. One pass writes the mask above the bracket and collects the
// candidates inside it, about a hundredth of all; the threshold is found among them, and they are written in order.
// Where the sample misled, or the bracket holds too many (equal) scores, histograms of all scores find the threshold.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <new>
#include <vector>

#include "granet_cpu.h"
#include "isa.h"
#include "parallel.h"
#include "topk_select.h"

namespace granet::topk {
namespace {

constexpr int64_t SAMPLED = 256, SAMPLES_MIN = 1024, SAMPLES_MAX = 1 << 16;  // one score in SAMPLED
constexpr double SIGMAS = 4.5;  // half width of the bracket: the sample misleads once in 100,000 selections
constexpr int64_t STORED = 8;   // at most one score in STORED is held as a candidate

// Where the threshold of a problem stands.
enum class State {
    trivial,    // all or none are selected: the range is the least key to select
    bracketed,  // it lies in the range, most likely
    collected,  // it is the range; the masks are written but for the candidates, which the chunks hold
    counted,    // it is the range; the chunks know how many scores are above and equal, no mask is written
};

// Scores that are selected together: those of one segment, or all.
struct Problem {
    int64_t first = 0, last = 0;  // its chunks
    int64_t size = 0, count = 0;
    State state = State::bracketed;
    Range range{0, KEY_MAX, 0};
    std::atomic<int64_t> found{0};  // candidates so far

    int64_t room() const { return size / STORED > CHUNK ? size / STORED : CHUNK; }
};

struct Chunk {
    Slice slice{};
    int64_t problem = 0;
    Counts counts{};    // above the range, and in it
    int64_t quota = 0;  // how many scores equal to the threshold are selected here
    std::vector<uint32_t> keys;  // of its candidates
    std::vector<uint16_t> indices;
};

// A fixed scrambling of i: where the sample falls, so that no period in the scores can meet it.
uint64_t scramble(uint64_t i) {
    i = (i + 1) * 0x9e3779b97f4a7c15u;
    i = (i ^ (i >> 32)) * 0xd6e8feb86659fd93u;
    return i ^ (i >> 32);
}

class Selection {
   public:
    Selection(int64_t problems, const int64_t* counts, bool absolute, int threads)
        : scan_(scan(absolute)), threads_(threads), problems_(static_cast<size_t>(problems)) {
        for (int64_t p = 0; p < problems; ++p) problems_[p].count = counts[p];
    }

    // Appends scores to the last problem added to, or to a later one.
    void add(int64_t p, const float* scores, const unsigned char* eligible, unsigned char* mask, int64_t size) {
        Problem& problem = problems_[p];
        if (problem.size == 0) problem.first = chunks();
        for (int64_t at = 0; at < size; at += CHUNK) {
            chunks_.emplace_back();
            chunks_.back().slice = {scores + at, eligible ? eligible + at : nullptr, mask + at,
                                    std::min(size - at, CHUNK)};
            chunks_.back().problem = p;
        }
        problem.last = chunks();
        problem.size += size;
    }

    // Writes all masks. Throws std::bad_alloc.
    void run() {
        const int64_t problems = static_cast<int64_t>(problems_.size());
        parallel_for(threads_, problems, [&](int64_t p) { bracket(problems_[p]); });
        read_all();
        parallel_for(threads_, problems, [&](int64_t p) { choose(problems_[p]); });
        for (Problem& problem : problems_) {
            if (problem.state == State::bracketed) narrow(problem);
            share_ties(problem);
        }
        parallel_for(threads_, chunks(), [&](int64_t c) { write(chunks_[c]); });
    }

   private:
    int64_t chunks() const { return static_cast<int64_t>(chunks_.size()); }

    // Sets the range in which the threshold lies, by all likelihood.
    void bracket(Problem& problem) {
        if (problem.count <= 0 || problem.count >= problem.size) {
            const uint32_t least = problem.count <= 0 ? KEY_MAX : 0;
            problem.state = State::trivial;
            problem.range = {least, least, 0};
            return;
        }
        if (problem.size <= CHUNK) return;
        const int64_t wanted = std::clamp(problem.size / SAMPLED, SAMPLES_MIN, SAMPLES_MAX);
        std::vector<uint32_t> keys = sample(problem, wanted), copy = keys;
        const int64_t size = static_cast<int64_t>(keys.size());
        // As many of the sample are selected as of all scores, in proportion, give or take.
        const double part = static_cast<double>(problem.count) / static_cast<double>(problem.size);
        const double rank = part * static_cast<double>(wanted);
        const double slack = SIGMAS * std::sqrt(rank * (1 - part)) + 2;
        const int64_t upper = static_cast<int64_t>(rank - slack), lower = static_cast<int64_t>(rank + slack) + 1;
        if (upper >= 1 && upper <= size) problem.range.hi = select(keys.data(), size, upper, {0, KEY_MAX, 0}).lo;
        if (lower <= size) problem.range.lo = select(copy.data(), size, lower, {0, KEY_MAX, 0}).lo;
    }

    // The keys of the eligible ones among `wanted` scores, one in each stretch of equal length.
    std::vector<uint32_t> sample(const Problem& problem, int64_t wanted) const {
        std::vector<uint32_t> keys;
        keys.reserve(static_cast<size_t>(wanted));
        const int64_t stride = problem.size / wanted;
        int64_t c = problem.first, begin = 0;  // `begin` scores of the problem lie before chunk c
        for (int64_t i = 0; i < wanted; ++i) {
            const int64_t at = i * stride + static_cast<int64_t>(scramble(i) % static_cast<uint64_t>(stride));
            while (at - begin >= chunks_[c].slice.size) begin += chunks_[c++].slice.size;
            const Slice& slice = chunks_[c].slice;
            if (!slice.eligible || slice.eligible[at - begin]) keys.push_back(scan_.key(slice.scores[at - begin]));
        }
        return keys;
    }

    // Writes the masks above each range and collects the candidates in it; where it is a single key, counts.
    void read_all() {
        const ThreadScratch memory(threads_, chunks(), CHUNK * sizeof(uint32_t), CHUNK * sizeof(uint16_t));
        parallel_for(threads_, chunks(), [&](int64_t c) {
            Chunk& chunk = chunks_[c];
            Problem& problem = problems_[chunk.problem];
            const Range& range = problem.range;
            if (problem.state == State::trivial) return;
            if (range.exact()) {
                chunk.counts = scan_.count(chunk.slice, range.lo);
                return;
            }
            const ThreadScratch::Lease lease(memory);
            uint32_t* keys = reinterpret_cast<uint32_t*>(lease.first());
            uint16_t* indices = reinterpret_cast<uint16_t*>(lease.second());
            chunk.counts = scan_.bracket(chunk.slice, range.lo, range.hi, keys, indices);
            const int64_t found = chunk.counts.equal;
            if (problem.found.fetch_add(found, std::memory_order_relaxed) + found > problem.room()) return;
            chunk.keys.assign(keys, keys + found);
            chunk.indices.assign(indices, indices + found);
        });
    }

    // Finds the threshold where the range turned out to hold it and all candidates were kept.
    void choose(Problem& problem) {
        if (problem.state == State::trivial) return;
        int64_t in = 0;
        for (int64_t c = problem.first; c < problem.last; ++c) {
            problem.range.above += chunks_[c].counts.above;
            in += chunks_[c].counts.equal;
        }
        if (problem.range.above >= problem.count || problem.range.above + in < problem.count) {
            problem.range = {0, KEY_MAX, 0};
        } else if (problem.range.exact()) {
            problem.state = State::counted;
        } else if (in <= problem.room()) {
            choose_among(problem, in);
        }
    }

    void choose_among(Problem& problem, int64_t candidates) {
        std::vector<uint32_t> keys;
        keys.reserve(static_cast<size_t>(candidates));
        for (int64_t c = problem.first; c < problem.last; ++c)
            keys.insert(keys.end(), chunks_[c].keys.begin(), chunks_[c].keys.end());
        problem.range = select(keys.data(), candidates, problem.count, problem.range);
        problem.state = State::collected;
    }

    // Finds the threshold by histograms of all scores.
    void narrow(Problem& problem) {
        const int64_t size = problem.last - problem.first;
        std::mutex mutex;
        while (!problem.range.exact()) {
            const Range range = problem.range;
            int64_t bins[BINS] = {};
            parallel_for(threads_, size, [&](int64_t c) {
                int64_t part[BINS] = {};
                scan_.histogram(chunks_[problem.first + c].slice, range.lo, range.hi, range.shift(), part);
                const std::lock_guard<std::mutex> lock(mutex);
                for (int64_t b = 0; b < BINS; ++b) bins[b] += part[b];
            });
            problem.range = range.narrowed(bins, problem.count);
        }
        parallel_for(threads_, size, [&](int64_t c) {
            Chunk& chunk = chunks_[problem.first + c];
            chunk.counts = scan_.count(chunk.slice, problem.range.lo);
        });
        problem.state = State::counted;
    }

    // Of the scores that equal the threshold, the first chunks take theirs first.
    void share_ties(const Problem& problem) {
        if (problem.state == State::trivial) return;
        int64_t left = problem.count - problem.range.above;
        for (int64_t c = problem.first; c < problem.last; ++c) {
            Chunk& chunk = chunks_[c];
            int64_t equal = chunk.counts.equal;
            if (problem.state == State::collected)
                equal = std::count(chunk.keys.begin(), chunk.keys.end(), problem.range.lo);
            chunk.quota = std::min(left, equal);
            left -= chunk.quota;
        }
    }

    void write(Chunk& chunk) const {
        const Problem& problem = problems_[chunk.problem];
        const Slice& slice = chunk.slice;
        const uint32_t threshold = problem.range.lo;
        int64_t quota = chunk.quota;
        if (problem.state == State::trivial) {
            scan_.write(slice, threshold);
        } else if (problem.state == State::collected) {
            for (size_t i = 0; i < chunk.keys.size(); ++i) {
                const uint32_t key = chunk.keys[i];
                slice.mask[chunk.indices[i]] = key > threshold || (key == threshold && quota-- > 0);
            }
        } else {
            const bool whole = quota == chunk.counts.equal;
            scan_.write(slice, whole ? threshold : threshold + 1);
            for (int64_t i = 0; !whole && quota > 0; ++i) {
                if (scan_.key(slice.scores[i]) != threshold || (slice.eligible && !slice.eligible[i])) continue;
                slice.mask[i] = 1;
                --quota;
            }
        }
    }

    const Scan& scan_;
    const int threads_;
    std::vector<Problem> problems_;
    std::vector<Chunk> chunks_;
};

}  // namespace

const Scan& scan(bool absolute) {
#if defined(__x86_64__)
    if (isa() == Isa::avx512) return scan_avx512(absolute);
    if (isa() == Isa::avx2) return scan_avx2(absolute);
#endif
    return scan_portable(absolute);
}

}  // namespace granet::topk

int granet_topk_mask(int64_t segments, const float* const* scores, const unsigned char* const* eligible,
                     const int64_t* sizes, const int64_t* counts, int global, int absolute, unsigned char* const* masks,
                     int threads) {
    try {
        granet::topk::Selection selection(global ? 1 : segments, counts, absolute != 0, std::max(threads, 1));
        for (int64_t s = 0; s < segments; ++s)
            selection.add(global ? 0 : s, scores[s], eligible ? eligible[s] : nullptr, masks[s], sizes[s]);
        selection.run();
        return GRANET_OK;
    } catch (const std::bad_alloc&) {
        return GRANET_OUT_OF_MEMORY;
    }
}
