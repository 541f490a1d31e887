#include "row_problem.h"

#define DLLM_ISA baseline
#define DLLM_NATIVE 4
#include "row_kernel.inc"
