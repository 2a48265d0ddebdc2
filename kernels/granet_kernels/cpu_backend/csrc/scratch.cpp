// Memory that is used again: fresh pages cost more than the kernels that would fill them.
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include "granet_cpu.h"
#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace granet {
namespace {

constexpr size_t PAGE = 4096, HUGE_PAGE = size_t(2) << 20;
constexpr int64_t PATIENCE = 4096;  // so many requests later a block that nobody wanted is given back to the system

size_t rounded(size_t bytes) {
    const size_t unit = bytes < HUGE_PAGE ? PAGE : HUGE_PAGE;
    return (std::max<size_t>(bytes, 1) + unit - 1) / unit * unit;
}

// Panels are read at scattered addresses: huge pages keep them within the reach of the TLB.
char* fresh(size_t size) {
    void* memory = nullptr;
    if (posix_memalign(&memory, size < HUGE_PAGE ? PAGE : HUGE_PAGE, size) != 0) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (size >= HUGE_PAGE) madvise(memory, size, MADV_HUGEPAGE);
#endif
    return static_cast<char*>(memory);
}

// Never destroyed, and free in a forked child: it must not inherit one locked by a thread that it does not have.
std::mutex* const mutexes[] = {new std::mutex, new std::mutex};
#if !defined(_WIN32)
void lock_all() {
    for (std::mutex* mutex : mutexes) mutex->lock();
}
void unlock_all() {
    for (std::mutex* mutex : mutexes) mutex->unlock();
}
const int registered = pthread_atfork(lock_all, unlock_all, unlock_all);
#endif

class Pool {
   public:
    // A block of at least `bytes`, at most an eighth larger. Throws std::bad_alloc.
    char* take(size_t bytes) {
        const size_t size = rounded(bytes);
        {
            const std::lock_guard<std::mutex> lock(*mutex_);
            ++requests_;
            drop_old();
            auto best = idle_.end();
            for (auto it = idle_.begin(); it != idle_.end(); ++it)
                if (it->size >= size && it->size <= size + size / 8 && (best == idle_.end() || it->size <= best->size))
                    best = it;
            if (best != idle_.end()) {
                char* memory = best->memory;
                used_.emplace(memory, best->size);
                idle_.erase(best);
                return memory;
            }
        }
        char* memory = fresh(size);
        try {
            const std::lock_guard<std::mutex> lock(*mutex_);
            idle_.reserve(used_.size() + 1 + idle_.size());  // so that give() cannot fail
            used_.emplace(memory, size);
        } catch (const std::bad_alloc&) {
            std::free(memory);
            throw;
        }
        return memory;
    }

    void give(char* memory) {
        const std::lock_guard<std::mutex> lock(*mutex_);
        const auto it = used_.find(memory);
        if (it == used_.end()) return;  // not from here, or given twice
        idle_.push_back({memory, it->second, requests_});
        used_.erase(it);
    }

    int64_t release() {
        const std::lock_guard<std::mutex> lock(*mutex_);
        int64_t bytes = 0;
        for (const Block& block : idle_) {
            bytes += int64_t(block.size);
            std::free(block.memory);
        }
        idle_.clear();
        return bytes;
    }

   private:
    struct Block {
        char* memory;
        size_t size;
        int64_t since;  // the number of requests when it was given back
    };

    void drop_old() {
        const auto old = [this](const Block& block) { return requests_ - block.since > PATIENCE; };
        for (const Block& block : idle_)
            if (old(block)) std::free(block.memory);
        idle_.erase(std::remove_if(idle_.begin(), idle_.end(), old), idle_.end());
    }

    std::mutex* const mutex_ = mutexes[1];
    std::vector<Block> idle_;  // the one given back last is taken first: it may still lie in a cache
    std::unordered_map<char*, size_t> used_;
    int64_t requests_ = 0;
};

// Never destroyed: tensors of a program that ends give their memory back later than any destructor runs.
Pool& pool() {
    static Pool* const instance = new Pool;
    return *instance;
}

}  // namespace

std::mutex& tables_mutex() { return *mutexes[0]; }

Scratch::Scratch(size_t bytes) : memory_(pool().take(bytes)) {}

Scratch::~Scratch() { pool().give(memory_); }

}  // namespace granet

void* granet_memory_take(int64_t bytes) {
    try {
        return granet::pool().take(size_t(bytes));
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void granet_memory_give(void* memory) { granet::pool().give(static_cast<char*>(memory)); }

int64_t granet_memory_release(void) { return granet::pool().release(); }
