#include "arena.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, size) ((void)(memory), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(memory, size) ((void)(memory), (void)(size))
#endif

namespace granet {
namespace {

constexpr size_t HUGE_PAGE = size_t(2) << 20;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t SEGMENT = size_t(1) << 28;  // to poison addresses takes memory
#else
constexpr size_t SEGMENT = size_t(1) << (sizeof(size_t) > 4 ? 36 : 28);  // of addresses: pages come as they are written
#endif
constexpr size_t MODEST = size_t(1) << 28;  // a segment where addresses are counted
constexpr size_t SLACK = size_t(64) << 20;
constexpr int64_t PATIENCE = 4096;  // requests between two looks at what is kept for nothing

size_t rounded(size_t bytes, size_t unit) { return (std::max<size_t>(bytes, 1) + unit - 1) / unit * unit; }

// Blocks begin and end at pages, so that what is free can be given back without its neighbours.
size_t page() {
    static const size_t size = std::max<size_t>(4096, size_t(std::max(sysconf(_SC_PAGESIZE), 0L)));
    return size;
}

// Whether addresses count as memory: by a limit of the process, or where the system promises no more than it has.
bool addresses_are_counted() {
    rlimit limit{};
    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) return true;
    std::ifstream file("/proc/sys/vm/overcommit_memory");
    int mode = 0;
    return file >> mode && mode == 2;
}

// At a huge page's address; NULL if there is none.
char* map(size_t size) {
    if (size > SIZE_MAX - HUGE_PAGE) return nullptr;
    constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, size + HUGE_PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    char* begin = static_cast<char*>(memory);
    char* aligned = begin + (HUGE_PAGE - uintptr_t(begin) % HUGE_PAGE) % HUGE_PAGE;
    if (aligned != begin) munmap(begin, aligned - begin);
    if (aligned + size != begin + size + HUGE_PAGE) munmap(aligned + size, begin + HUGE_PAGE - aligned);
#if defined(MADV_HUGEPAGE)
    madvise(aligned, size, MADV_HUGEPAGE);  // panels are read at scattered addresses: within the reach of the TLB
#endif
    return aligned;
}

}  // namespace

char* Arena::take(size_t bytes) {
    if (bytes > SIZE_MAX - 2 * HUGE_PAGE) throw std::bad_alloc();
    const size_t size = rounded(bytes, page());
    if (++requests_ % PATIENCE == 0) trim();
    size_t i = best(size);
    if (i == blocks_.size()) i = add_segment(size);
    if (blocks_[i].size > size) {
        const Block& b = blocks_[i];
        const Block rest{b.memory + size, b.size - size, b.touched - std::min(b.touched, size), false, false};
        blocks_.insert(blocks_.begin() + ptrdiff_t(i) + 1, rest);
        blocks_[i].size = size;
    }
    blocks_[i].touched = size;
    blocks_[i].used = true;
    used_ += size;
    peak_ = std::max(peak_, used_);
    ASAN_UNPOISON_MEMORY_REGION(blocks_[i].memory, bytes);
    return blocks_[i].memory;
}

void Arena::give(char* memory) {
    const auto it = std::lower_bound(blocks_.begin(), blocks_.end(), memory,
                                     [](const Block& block, const char* address) { return block.memory < address; });
    if (it == blocks_.end() || it->memory != memory || !it->used) return;
    const auto i = size_t(it - blocks_.begin());
    ASAN_POISON_MEMORY_REGION(memory, it->size);
    it->used = false;
    used_ -= it->size;
    join_next(i);
    if (i > 0 && !blocks_[i - 1].used) join_next(i - 1);
}

// The smallest free block that is large enough, of equal ones the first; blocks_.size() if there is none.
size_t Arena::best(size_t size) const {
    size_t found = blocks_.size();
    for (size_t i = 0; i < blocks_.size(); ++i) {
        const bool fits = !blocks_[i].used && blocks_[i].size >= size;
        if (fits && (found == blocks_.size() || blocks_[i].size < blocks_[found].size)) found = i;
    }
    return found;
}

// One segment serves even large models: between two, nothing can be joined.
size_t Arena::add_segment(size_t size) {
    blocks_.reserve(blocks_.size() + 2);
    const size_t least = rounded(size, HUGE_PAGE);
    size_t mapped = std::max(least, addresses_are_counted() ? MODEST : SEGMENT);
    char* memory = map(mapped);
    while (!memory && mapped > least) {
        mapped = std::max(least, rounded(std::min(MODEST, mapped / 2), HUGE_PAGE));
        memory = map(mapped);
    }
    if (!memory) throw std::bad_alloc();
    ASAN_POISON_MEMORY_REGION(memory, mapped);
    const auto at = std::find_if(blocks_.begin(), blocks_.end(), [&](const Block& b) { return b.memory > memory; });
    return size_t(blocks_.insert(at, Block{memory, mapped, 0, false, true}) - blocks_.begin());
}

void Arena::join_next(size_t i) {
    if (i + 1 == blocks_.size() || blocks_[i + 1].used || blocks_[i + 1].first) return;
    Block& block = blocks_[i];
    const Block& next = blocks_[i + 1];
    if (next.touched > 0) block.touched = block.size + next.touched;
    block.size += next.size;
    blocks_.erase(blocks_.begin() + ptrdiff_t(i) + 1);
}

int64_t Arena::release() {
    int64_t bytes = 0;
    for (size_t i = 0; i < blocks_.size();) {
        Block& block = blocks_[i];
        if (block.used) {
            ++i;
            continue;
        }
        if (block.first && (i + 1 == blocks_.size() || blocks_[i + 1].first)) {
            bytes += int64_t(block.touched);
            ASAN_UNPOISON_MEMORY_REGION(block.memory, block.size);
            munmap(block.memory, block.size);
            blocks_.erase(blocks_.begin() + ptrdiff_t(i));
            continue;
        }
        if (block.touched > 0 && madvise(block.memory, block.touched, MADV_DONTNEED) == 0) {
            bytes += int64_t(block.touched);
            block.touched = 0;
        }
        ++i;
    }
    return bytes;
}

// Releases what is free where much more is kept than has been in use of late.
void Arena::trim() {
    size_t kept = used_;
    for (const Block& block : blocks_)
        if (!block.used) kept += block.touched;
    if (kept > peak_ + peak_ / 4 + SLACK) release();
    peak_ = used_;
}

}  // namespace granet
