// The sizes of a core's caches, by which work is cut into blocks.
#pragma once

#include <cstdint>

namespace granet {

struct Caches {
    int64_t first, second;  // bytes, of data
};

// As the system tells, or 32 kB and 1 MB.
const Caches& caches();

}  // namespace granet
