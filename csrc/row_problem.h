// What the dispatcher hands to the row kernels: one chunk of raw logits and where its results go.
#pragma once

#include <cstdint>

namespace dllm {

constexpr int kLanes = 16;  // of every partial sum on every ISA: hence equal bits

struct RowProblem {
  float* logits;  // [rows, vocabulary], unit stride, row_stride floats between rows; overwritten
  int64_t rows, vocabulary, row_stride;
  const int64_t* target;           // [rows], inside the vocabulary
  const float* bias;               // [vocabulary] or null
  float softcap;                   // 0: none
  float temperature;               // of every row, where temperature_rows is null
  const float* temperature_rows;   // [rows] or null
  const uint16_t* excluded;        // bit l of word b: class 16 b + l is out (so are those past the vocabulary);
                                   // null exactly when the logits need no transformation at all
  const float* coef;               // [rows] or null: 1
  const float* entropy_coef;       // [rows] or null: 0
  float* entropy_operand;          // [rows, vocabulary] or null
  int64_t entropy_operand_stride;
  bool gradient;
  float *logp, *lse;               // [rows]
  float *entropy, *top_logp;       // [rows] or null
  int64_t* top_id;                 // null exactly when top_logp is
};

using RowKernel = void (*)(const RowProblem&, int64_t first_row, int64_t last_row);

namespace baseline { void rows(const RowProblem&, int64_t, int64_t); }
namespace avx2 { void rows(const RowProblem&, int64_t, int64_t); }
namespace avx512 { void rows(const RowProblem&, int64_t, int64_t); }

}  // namespace dllm
