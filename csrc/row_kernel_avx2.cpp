#include "row_problem.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define DLLM_ISA avx2
#define DLLM_NATIVE 8
#include "row_kernel.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
