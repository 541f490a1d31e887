#include "head_problem.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
#define DLLM_ISA avx512bf16
#define DLLM_NATIVE 16
#define DLLM_FMA(a, b, c) ((NativeF)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define DLLM_PANEL 32
#define DLLM_STRIP 14
#define DLLM_PAIRS 1
#define DLLM_DOT(a, b, c) ((NativeF)_mm512_dpbf16_ps((__m512)(c), (__m512bh)(a), (__m512bh)(b)))
#include "head.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
