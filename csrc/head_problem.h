// What the dispatcher hands to the engine of an instruction set: one head call, checked, as addresses, sizes and strides.
#pragma once

#include <cstdint>

#include "team.h"

namespace dllm {

constexpr int kLanes = 16;

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };

struct Matrix {  // element (i, j) at data + i * row + j * column, in elements
  const void* data;
  Type type;
  int64_t row, column;
};

struct Operands {
  Matrix hidden, weight;
  const int64_t* index;             // [N] rows of hidden, or null: all in order
  int64_t rows, vocabulary, width;  // N, V, H
};

struct LowRank {  // an adapter: `hidden weight^T` is added to the raw logits
  Matrix hidden, weight;  // u [M, R], by the same rows as the hidden states, and B [V, R]
  int64_t rank;           // R, 0 without one
};

// What turns raw logits into final ones: dllm_kernels' HeadOptions, with the excluded ids as a mask.
struct Options {
  const float* bias;              // [V] or null
  float softcap;                  // 0: none
  float temperature;              // of every row, where temperature_rows is null
  const float* temperature_rows;  // [N] or null
  const uint8_t* excluded;        // [V] or null
};

struct Statistics {  // [N] each, null where not wanted
  float *logp, *lse, *entropy, *top_logp;  // logp: [N, each] of several targets
  int64_t* top_id;
  float* best_logp;  // [N, best]
  int64_t* best_id;
  int64_t best;  // so many of the likeliest ids, which needs `several`; 0: none
};

// Several targets per row, of which two may be equal. Their logits are kept out of the sums like one target's.
struct Several {
  bool several;
  int64_t each;       // M, may be 0
  const float* own;   // [N, M]: the coefficient of each id's logp, of equal ids together; null for late coefficients
  const float* given; // [N, M], `from_operands`: the gradients of the final logits
};

struct Draw {
  const int64_t* key;  // [N], null without noise
  uint32_t step;
  float sample_temperature;  // 0: argmax
  const float* temperature_of;  // [N] or null: of each row, where 0 is argmax
  int64_t* token;            // [N]
  float* token_logp;         // [N], at temperature 1
};

// Where gradients go: null where one is not wanted.
struct Gradients {
  void* vectors[2];     // [N, H] in `type`: sums over v of operand 0 and of operand 1 times W
  float* low_vectors[2];  // [N, R]: times B, where the vectors are wanted
  void* operands[2];    // [V, N] in `type`: the operands themselves, for the `keep` plan
  float* dweight;       // [V, H] fp32, of operand 0
  void* rounded;        // [V, H] in `type`, of 16 bits: where the sums go once they are complete; then `dweight` holds those of
                        // all chunks but the last, and is null where there is one chunk alone
  float* dbias;         // [V] fp32
  int64_t dweight_row;  // of both
  Type type;
  bool overwrite;       // the buffers are written, not added to; so with `rounded`
  float* dlow;          // [V, R] fp32, of B
  int64_t dlow_row;
};

struct HeadProblem : Operands, Statistics, Draw, Several {
  LowRank low;
  Options options;
  const int64_t* target;  // [N] or [N, each], checked; null for sampling

  // Operand 0 is coef * d logp / d z + entropy_coef * d entropy / d z (coef null: 1, entropy_coef null: 0), operand 1 is
  // d entropy / d z. With several targets -coef p + entropy_coef * d entropy / d z but at these; there what their own
  // coefficients say or, for late ones, the slope d final / d raw, and 0 in operand 1.
  bool gradient;
  const float *coef, *entropy_coef;  // [N] or null
  Gradients out;

  // `from_operands`: operand 0 is stored[0] * coef + stored[1] * entropy_coef, and no logits are made
  const void* stored[2];  // [V, N] in `out.type`, or null

  int64_t chunk;  // rows at a time, a multiple of 32
};

struct Engine {
  void (*head)(const HeadProblem&, Team&, int rank, float* workspace);
  int64_t (*workspace)(const HeadProblem&, int threads);  // floats
  int panel;                                             // rows that share a register tile
};

namespace baseline { extern const Engine engine; }
namespace avx2 { extern const Engine engine; }
namespace avx512 { extern const Engine engine; }
namespace avx512bf16 { extern const Engine engine; }
namespace avx512bf16_emulated { extern const Engine engine; }

}  // namespace dllm
