#include "divergence.h"
#include "expectation.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define DLLM_ISA avx512
#define DLLM_NATIVE 16
#define DLLM_FMA(a, b, c) ((NativeF)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define DLLM_PANEL 32
#define DLLM_STRIP 14
#define DLLM_PAIRS 0
#define DLLM_DOT DLLM_FMA
#include "head.inc"
#include "divergence.inc"
#include "expectation.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
