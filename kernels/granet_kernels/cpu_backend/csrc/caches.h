// The sizes of a core's caches, by which work is cut into blocks.
#pragma once

#include <cstdint>

namespace granet {

struct Caches {
    int64_t first, second;  // bytes, of data
};

// Those of the first core, as Linux tells, or 32 kB and 1 MB. The same whichever core asks: sums of other blocks are
// rounded in another way.
const Caches& caches();

}  // namespace granet
