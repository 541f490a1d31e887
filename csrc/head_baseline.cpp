#include "divergence.h"
#include "expectation.h"

#define DLLM_ISA baseline
#define DLLM_NATIVE 4
#define DLLM_FMA(a, b, c) ((a) * (b) + (c))
#define DLLM_PANEL 16
#define DLLM_STRIP 2
#define DLLM_PAIRS 0
#define DLLM_DOT DLLM_FMA
#include "head.inc"
#include "divergence.inc"
#include "expectation.inc"
