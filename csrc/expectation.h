// What the dispatcher hands to an instruction set for the expectation of an embedding: slabs of final logits that the vendor's
// products have made. The specification is dllm_kernels/backends/expectation/reference.py.
#pragma once

#include "head_problem.h"

namespace dllm {

struct Softened {
  const float* z;  // final logits [columns][rows]
  float* out;      // [columns][rows] result: exp(z - top); may be z
  int64_t columns, rows;
  float* top;    // [rows] the largest logit so far, -inf in the beginning
  double* sum;   // [rows] of exp(z - top), 0 in the beginning
  float* scale;  // [rows] result: by what sums below the old top are to be multiplied
  // room of each column part, so that no sum depends on the number of threads
  int64_t parts;
  float* part_top;   // [parts][rows]
  double* part_sum;  // [parts][rows]
};

struct Pulled {
  const float *z, *pull;  // [columns][rows] final logits, and upstream gradients times each id's embedding, or null
  int64_t columns, rows;
  const float *top, *inverse;            // [rows]: a probability is p = exp(z - top) * inverse
  const float *mean, *factor, *squeeze;  // [rows], of `pull`; squeeze may be null
  float* p;    // [columns][rows] result, may be z; null where not wanted
  float* out;  // [columns][rows] result, where there is `pull`, and may be that: the gradient of the raw logits
};

struct Expectation {
  void (*soften)(const Softened&, Team&);
  // out = factor * p * (pull - mean) * (1 - (squeeze z)^2)
  void (*pull)(const Pulled&, Team&);
};

namespace baseline { extern const Expectation expectation; }
namespace avx2 { extern const Expectation expectation; }
namespace avx512 { extern const Expectation expectation; }

}  // namespace dllm
