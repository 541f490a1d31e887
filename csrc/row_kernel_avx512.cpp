#include "row_problem.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC target("avx512f")
#endif
#define DLLM_ISA avx512
#define DLLM_NATIVE 16
#include "row_kernel.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
