#include "head_problem.h"

#define DLLM_ISA baseline
#define DLLM_NATIVE 4
#define DLLM_FMA(a, b, c) ((a) * (b) + (c))
#define DLLM_PANEL 16
#define DLLM_STRIP 2
#include "head.inc"
