#include "divergence.h"
#include "expectation.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define DLLM_ISA avx2
#define DLLM_NATIVE 8
#define DLLM_FMA(a, b, c) ((NativeF)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define DLLM_PANEL 16
#define DLLM_STRIP 6
#define DLLM_PAIRS 0
#define DLLM_DOT DLLM_FMA
#include "head.inc"
#include "divergence.inc"
#include "expectation.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
