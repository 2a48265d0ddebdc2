#include "caches.h"

#include <unistd.h>

namespace granet {
namespace {

Caches find() {
    Caches found{0, 0};
#if defined(_SC_LEVEL1_DCACHE_SIZE) && defined(_SC_LEVEL2_CACHE_SIZE)
    found = {sysconf(_SC_LEVEL1_DCACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_SIZE)};
#endif
    if (found.first < (16 << 10)) found.first = 32 << 10;
    if (found.second < (128 << 10)) found.second = 1 << 20;
    return found;
}

}  // namespace

const Caches& caches() {
    static const Caches found = find();
    return found;
}

}  // namespace granet
