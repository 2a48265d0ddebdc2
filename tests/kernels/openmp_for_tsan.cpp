// The OpenMP functions that the native library calls, on plain pthreads, for `make sanitize-thread`.
//
// ThreadSanitizer sees what pthreads order, but nothing of what libgomp orders by futexes: with libgomp every parallel
// region looks like a race. Here a region starts threads and joins them and nothing else orders them; iterations are
// dealt in turn, so that even in a short loop no thread gets them all. What is missing here fails at link time.
#include <pthread.h>

#include <algorithm>
#include <vector>

namespace {

struct Member {
    void (*body)(void*);
    void* data;
    int index, team;
    long next, end, chunk;  // of the loop that it is in
};

thread_local Member self{nullptr, nullptr, 0, 1, 0, 0, 0};

void* run(void* member) {
    self = *static_cast<Member*>(member);
    self.body(self.data);
    return nullptr;
}

}  // namespace

// Hidden, so that the library calls these and not those of torch's libgomp.
#pragma GCC visibility push(hidden)
extern "C" {

int omp_get_thread_num() { return self.index; }
int omp_get_num_threads() { return self.team; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
    const Member outer = self;
    std::vector<Member> members(threads);
    std::vector<pthread_t> started(threads);
    for (unsigned i = 0; i < threads; ++i) members[i] = {body, data, int(i), int(threads), 0, 0, 0};
    for (unsigned i = 1; i < threads; ++i) pthread_create(&started[i], nullptr, run, &members[i]);
    run(&members[0]);
    for (unsigned i = 1; i < threads; ++i) pthread_join(started[i], nullptr);
    self = outer;
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* start, long* end) {
    *start = self.next;
    *end = std::min(self.next + self.chunk, self.end);
    self.next += self.chunk * self.team;
    return *start < *end;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long first, long last, long increment, long chunk, long* start, long* end) {
    self.chunk = increment * chunk;
    self.next = first + self.chunk * self.index;
    self.end = last;
    return GOMP_loop_nonmonotonic_dynamic_next(start, end);
}

void GOMP_loop_end_nowait() {}
}
