// Threads and scratch memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "granet_cpu.h"

namespace granet {

// f(i) for every i in [0, n), on up to `threads` threads. One thread opens no OpenMP region: a forked child has none.
// Throws std::bad_alloc if an f threw anything, after all have ended.
template <typename F>
void parallel_for(int threads, int64_t n, const F& f) {
    bool failed = false;
    const auto guarded = [&](int64_t i) {
        try {
            f(i);
        } catch (const std::exception&) {
            return true;
        }
        return false;
    };
#ifdef _OPENMP
    if (threads > 1 && n > 1) {
        const int used = int64_t(threads) < n ? threads : int(n);
#pragma omp parallel for schedule(dynamic, 1) num_threads(used) reduction(|| : failed)
        for (int64_t i = 0; i < n; ++i) failed = guarded(i) || failed;
        if (failed) throw std::bad_alloc();
        return;
    }
#endif
    (void)threads;
    for (int64_t i = 0; i < n; ++i) failed = guarded(i) || failed;
    if (failed) throw std::bad_alloc();
}

// f(), which returns a status; no exception leaves the C ABI.
template <typename F>
int guarded(const F& f) {
    try {
        return f();
    } catch (const std::exception&) {  // bad_alloc, or the length_error of a container
        return GRANET_OUT_OF_MEMORY;
    }
}

// Guards the tables of all layouts.
std::mutex& tables_mutex();

// Memory aligned to vectors, taken from buffers that earlier calls gave back: fresh pages cost more than the kernels
// that would fill them. Throws std::bad_alloc.
class Scratch {
   public:
    explicit Scratch(size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    char* bytes() const { return memory_; }
    template <typename T>
    T* as() const {
        return reinterpret_cast<T*>(memory_);
    }

   private:
    char* memory_;
};

// Two pieces of scratch memory for each thread of a loop.
class ThreadScratch {
   public:
    ThreadScratch(int threads, int64_t items, size_t first, size_t second) : first_(round(first)) {
        const int64_t used = items < threads ? items : (threads > 1 ? threads : 1);
        for (int64_t i = 0; i < used; ++i) memory_.push_back(std::make_unique<Scratch>(first_ + second));
        taken_ = std::vector<std::atomic<bool>>(memory_.size());
    }

    // One thread's memory while it works on an item.
    class Lease {
       public:
        explicit Lease(const ThreadScratch& scratch) : scratch_(scratch) {
            while (scratch.taken_[index_].exchange(true, std::memory_order_acquire))
                index_ = (index_ + 1) % scratch.memory_.size();
        }
        ~Lease() { scratch_.taken_[index_].store(false, std::memory_order_release); }
        Lease(const Lease&) = delete;
        Lease& operator=(const Lease&) = delete;

        char* first() const { return scratch_.memory_[index_]->bytes(); }
        char* second() const { return first() + scratch_.first_; }

       private:
        const ThreadScratch& scratch_;
        size_t index_ = 0;
    };

   private:
    static size_t round(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

    size_t first_;
    std::vector<std::unique_ptr<Scratch>> memory_;
    mutable std::vector<std::atomic<bool>> taken_;
};

}  // namespace granet
