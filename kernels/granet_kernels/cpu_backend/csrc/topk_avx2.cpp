// The top-k loops for AVX2.
#if defined(__x86_64__)
#include "topk_scan.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif

#include "topk_scan.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const granet::topk::Scan& granet::topk::scan_avx2(bool absolute) { return absolute ? table<true> : table<false>; }
#endif
