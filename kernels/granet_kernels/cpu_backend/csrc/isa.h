// The instruction sets that the kernels are compiled for.
#pragma once

#include <atomic>

namespace granet {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2 };

Isa isa();

}  // namespace granet
