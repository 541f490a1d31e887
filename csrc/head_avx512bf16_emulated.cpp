#include "head_problem.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
// The pair engine with its instruction written out, so that packing and folding can be tested where the instruction is
// missing. Never chosen by itself.
#define DLLM_ISA avx512bf16_emulated
#define DLLM_NATIVE 16
#define DLLM_FMA(a, b, c) ((NativeF)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define DLLM_PANEL 32
#define DLLM_STRIP 14
#define DLLM_PAIRS 1
#define DLLM_EVEN(a) _mm512_castsi512_ps(_mm512_slli_epi32((__m512i)(a), 16))
#define DLLM_ODD(a) _mm512_castsi512_ps(_mm512_and_si512((__m512i)(a), _mm512_set1_epi32((int)0xffff0000u)))
#define DLLM_DOT(a, b, c) \
  ((NativeF)_mm512_fmadd_ps(DLLM_ODD(a), DLLM_ODD(b), _mm512_fmadd_ps(DLLM_EVEN(a), DLLM_EVEN(b), (__m512)(c))))
#include "head.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
