#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace granet {
namespace {

constexpr size_t HUGE_PAGE = size_t(2) << 20;
constexpr size_t MAX_KEPT = size_t(256) << 20;  // bytes that the pool holds on to

struct Block {
    char* memory;
    size_t size;
};

std::mutex mutex;
std::vector<Block> pool;
size_t kept = 0;

size_t rounded(size_t bytes) {
    const size_t unit = bytes < HUGE_PAGE ? 4096 : HUGE_PAGE;
    return (std::max<size_t>(bytes, 1) + unit - 1) / unit * unit;
}

// Panels are read at scattered addresses: huge pages keep them within the reach of the TLB.
char* fresh(size_t size) {
    void* memory = nullptr;
    if (posix_memalign(&memory, size < HUGE_PAGE ? 4096 : HUGE_PAGE, size) != 0) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (size >= HUGE_PAGE) madvise(memory, size, MADV_HUGEPAGE);
#endif
    return static_cast<char*>(memory);
}

}  // namespace

Scratch::Scratch(size_t bytes) : size_(rounded(bytes)) {
    {
        const std::lock_guard<std::mutex> lock(mutex);
        auto best = pool.end();
        for (auto it = pool.begin(); it != pool.end(); ++it)
            if (it->size >= size_ && it->size <= 4 * size_ && (best == pool.end() || it->size < best->size)) best = it;
        if (best != pool.end()) {
            memory_ = best->memory;
            size_ = best->size;
            kept -= size_;
            pool.erase(best);
            return;
        }
    }
    memory_ = fresh(size_);
}

Scratch::~Scratch() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (kept + size_ > MAX_KEPT) {
        std::free(memory_);
        return;
    }
    try {
        pool.push_back({memory_, size_});
        kept += size_;
    } catch (const std::bad_alloc&) {
        std::free(memory_);
    }
}

}  // namespace granet
