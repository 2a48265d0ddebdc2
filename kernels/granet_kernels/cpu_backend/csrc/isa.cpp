// Which instructions the kernels use: the best that the CPU has, unless a caller asks for less.
#include "isa.h"

#include <cstring>

#include "granet_cpu.h"
#include "kernels.h"

namespace granet {
namespace {

Isa best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512) return Isa::avx512;
    if (avx2) return Isa::avx2;
#endif
    return Isa::portable;
}

const char* const names[] = {"portable", "avx2", "avx512"};
std::atomic<Isa> chosen{best()};

}  // namespace

Isa isa() { return chosen.load(std::memory_order_relaxed); }

const KernelSet& kernels() {
#if defined(__x86_64__)
    if (isa() == Isa::avx512) return kernels_avx512();
    if (isa() == Isa::avx2) return kernels_avx2();
#endif
    return kernels_portable();
}

}  // namespace granet

int granet_abi_version(void) { return GRANET_ABI_VERSION; }

const char* granet_isa(void) { return granet::names[static_cast<int>(granet::isa())]; }

int granet_set_isa(const char* name) {
    for (int i = 0; i <= static_cast<int>(granet::best()); ++i) {
        if (std::strcmp(name, granet::names[i]) == 0) {
            granet::chosen = static_cast<granet::Isa>(i);
            return 0;
        }
    }
    return -1;
}

int granet_has_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
