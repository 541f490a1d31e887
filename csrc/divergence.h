// What the dispatcher hands to an instruction set for the divergence of two heads: slabs of logits that the vendor's products
// have made. The specification is dllm_kernels/backends/divergence/reference.py.
#pragma once

#include <type_traits>

#include "head_problem.h"

namespace dllm {

struct RawLogits {  // of one head, made final in place; what is excluded becomes -inf
  float* z;         // [columns][rows], columns `pitch` apart
  int64_t columns, rows, pitch;
  int64_t first;    // id of the first column
  Options options;
};

enum class Kind : int { forward_kl = 0, reverse_kl = 1, jsd = 2 };

struct DivergenceSlab {
  const float *student, *teacher;  // final logits [columns][rows]
  int64_t columns, rows;
  Kind kind;
  float beta, rest;  // the teacher's share of the mixture, and the student's
  const float *student_lse, *teacher_lse;  // [rows]; null for `look`
};

// What a slab adds to the sums of those before; each column part has a place of its own, so that no sum depends on the number of
// threads. In the beginning maxima are -inf and sums 0.
constexpr int64_t kLookSums = 5, kMixSums = 2;

struct Divergence {
  void (*finish)(const RawLogits&, Team&);
  // [parts][kLookSums][rows]: max and sum of exp(z - max) of the student, the same of the teacher, and of forward_kl the sum of
  // exp(t - max) (t - s), of reverse_kl that of exp(s - max) (s - t)
  void (*look)(const DivergenceSlab&, double* sums, int64_t parts, Team&);
  // of jsd, [parts][kMixSums][rows]: sums of p (log p - log m) and q (log q - log m)
  void (*mix)(const DivergenceSlab&, double* sums, int64_t parts, Team&);
  // out [columns][rows] = factor * d divergence / d student's logit * (1 - (squeeze s)^2); mean and factor [rows], squeeze [rows]
  // or null
  void (*operand)(const DivergenceSlab&, const float* mean, const float* factor, const float* squeeze, float* out, Team&);
};

namespace baseline { extern const Divergence divergence; }
namespace avx2 { extern const Divergence divergence; }
namespace avx512 { extern const Divergence divergence; }

}  // namespace dllm
