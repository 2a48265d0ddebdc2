// Memory that is used again: fresh pages cost more than the kernels that would fill them.
#include <mutex>
#include <new>

#include "arena.h"
#include "granet_cpu.h"
#include "parallel.h"

#include <pthread.h>

namespace granet {
namespace {

// Never destroyed, and free in a forked child: it must not inherit one locked by a thread that it does not have.
std::mutex* const mutexes[] = {new std::mutex, new std::mutex};
void lock_all() {
    for (std::mutex* mutex : mutexes) mutex->lock();
}
void unlock_all() {
    for (std::mutex* mutex : mutexes) mutex->unlock();
}
const int registered = pthread_atfork(lock_all, unlock_all, unlock_all);

// Never destroyed: tensors of a program that ends give their memory back later than any destructor runs.
Arena* const arena = new Arena;

// f(arena), one thread at a time.
template <typename F>
auto with_arena(const F& f) {
    const std::lock_guard<std::mutex> lock(*mutexes[1]);
    return f(*arena);
}

}  // namespace

std::mutex& tables_mutex() { return *mutexes[0]; }

Scratch::Scratch(size_t bytes) : memory_(with_arena([&](Arena& a) { return a.take(bytes); })) {}

Scratch::~Scratch() {
    with_arena([&](Arena& a) { a.give(memory_); });
}

}  // namespace granet

int64_t granet_memory_release(void) {
    return granet::with_arena([](granet::Arena& a) { return a.release(); });
}
