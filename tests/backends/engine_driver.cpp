// A stand-alone caller of the engines of csrc/, for sanitizers: every array is an allocation of its own, of exactly the size
// that the call may touch, and neither workspace nor results are written before. Prints the number of calls.
//
//     clang++ -std=c++17 -g -O1 -fsanitize=memory -Icsrc csrc/head_*.cpp csrc/team.cpp tests/backends/engine_driver.cpp
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include "divergence.h"
#include "expectation.h"

#if defined(__has_feature)
#if __has_feature(memory_sanitizer)
extern "C" void __msan_check_mem_is_initialized(const volatile void* data, size_t bytes);
#define DLLM_WRITTEN(data, bytes) __msan_check_mem_is_initialized(data, bytes)
#endif
#endif
#ifndef DLLM_WRITTEN
#define DLLM_WRITTEN(data, bytes) ((void)(data), (void)(bytes))
#endif

namespace {

using dllm::Type;

uint32_t state = 1;
float number() {  // in [-1, 1)
  state = state * 1664525u + 1013904223u;
  return (float)(int32_t)state * (1.0f / 2147483648.0f);
}

template <class T> struct Array {
  explicit Array(int64_t count) : count(count), data(static_cast<T*>(std::malloc(sizeof(T) * (size_t)(count ? count : 1)))) {}
  ~Array() { std::free(data); }
  Array(const Array&) = delete;
  void written() const { DLLM_WRITTEN(data, sizeof(T) * (size_t)count); }
  int64_t count;
  T* data;
};

struct Values : Array<char> {  // floats in memory as one of three types
  Values(int64_t n, Type type) : Array<char>(n * (type == Type::f32 ? 4 : 2)) {
    for (int64_t i = 0; i < n; ++i) {
      const float x = number();
      uint32_t word;
      std::memcpy(&word, &x, 4);
      const uint16_t half = type == Type::bf16 ? (uint16_t)(word >> 16) : (uint16_t)((word >> 16 & 0x8000) | (0x3000 + (word >> 13 & 0x3ff)));
      if (type == Type::f32) std::memcpy(data + 4 * i, &x, 4);
      else std::memcpy(data + 2 * i, &half, 2);
    }
  }
};

void run(const dllm::Engine& engine, dllm::HeadProblem p, int64_t rows_at_once) {
  p.chunk = (rows_at_once + engine.panel - 1) / engine.panel * engine.panel;
  const int64_t floats = engine.workspace(p, 1);
  std::unique_ptr<void, void (*)(void*)> workspace(std::aligned_alloc(64, (size_t)(floats + 16) * 4 / 64 * 64 + 64), std::free);
  dllm::Team::run(1, [&](dllm::Team& team, int rank) { engine.head(p, team, rank, static_cast<float*>(workspace.get())); });
}

int calls(const dllm::Engine& engine, Type type, int64_t N, int64_t H, int64_t V, bool options) {
  const int64_t width = type == Type::f32 ? 4 : 2;
  // with options an adapter too, of one tile or two, with B in the head's type or in fp32
  const int64_t R = options ? H == 7 ? 17 : 5 : 0;
  const Type low_type = N % 2 ? type : Type::f32;
  Values hidden(N * H, type), weight(V * H, type), low_hidden(N * R, Type::f32), low_weight(V * R, low_type);
  Array<float> low0(N * R), low1(N * R), dlow(V * R);
  float* const into_dlow = R ? dlow.data : nullptr;
  Array<float> bias(V), temperature(N), coef(N), entropy_coef(N), logp(N), lse(N), entropy(N), top_logp(N), dweight(V * H), dbias(V);
  Array<int64_t> target(N), key(N), top_id(N), token(N);
  Array<uint8_t> excluded(V);
  Array<char> vector0(N * H * width), vector1(N * H * width), operand0(N * V * width), operand1(N * V * width);
  for (int64_t v = 0; v < V; ++v) {
    bias.data[v] = number();
    excluded.data[v] = v % 5 == 4;
  }
  for (int64_t i = 0; i < N; ++i) {
    temperature.data[i] = 1.5f + number();
    coef.data[i] = number();
    entropy_coef.data[i] = number();
    target.data[i] = i * 5 % V / 5 * 5;
    key.data[i] = (int64_t)(1e18 * (double)number());
  }
  dllm::HeadProblem p{};
  static_cast<dllm::Operands&>(p) = {{hidden.data, type, H, 1}, {weight.data, type, H, 1}, nullptr, N, V, H};
  p.low = {{low_hidden.data, Type::f32, R, 1}, {low_weight.data, low_type, R, 1}, R};
  p.options.temperature = 1;
  if (options) p.options = {bias.data, 3.0f, 1.0f, temperature.data, excluded.data};
  static_cast<dllm::Statistics&>(p) = {logp.data, lse.data, entropy.data, top_logp.data, top_id.data};
  p.target = target.data;
  p.out.type = type;
  run(engine, p, N);
  for (const Array<float>* x : {&logp, &lse, &entropy, &top_logp}) x->written();
  top_id.written();

  dllm::HeadProblem late = p;  // vectors and operands for coefficients to come
  late.gradient = true;
  late.out = {{vector0.data, vector1.data}, {low0.data, low1.data}, {operand0.data, operand1.data}, nullptr, nullptr, nullptr, 0, type, true, nullptr, 0};
  run(engine, late, N);
  for (const Array<float>* x : {&low0, &low1}) x->written();
  for (const Array<char>* x : {&vector0, &vector1, &operand0, &operand1}) x->written();

  dllm::HeadProblem known = p;  // coefficients known, all gradients, several chunks
  known.gradient = true;
  known.coef = coef.data;
  known.entropy_coef = options ? entropy_coef.data : nullptr;
  known.out = {{vector0.data, nullptr}, {low0.data, nullptr}, {nullptr, nullptr}, dweight.data, nullptr, dbias.data, H, type, true, into_dlow, R};
  run(engine, known, 32);
  for (const Array<float>* x : {&dweight, &dbias, &dlow, &low0}) x->written();
  vector0.written();
  if (type != Type::f32) {  // the weight's gradient rounded: with one chunk from the tiles alone, with several from sums
    Array<char> rounded(V * H * width), of_one(V * H * width);
    dllm::HeadProblem narrow = known;
    narrow.out.rounded = rounded.data;
    run(engine, narrow, 32);
    rounded.written();
    narrow.out.rounded = of_one.data;
    narrow.out.dweight = nullptr;
    run(engine, narrow, N);
    of_one.written();
  }

  dllm::HeadProblem kept{};  // from stored operands
  static_cast<dllm::Operands&>(kept) = p;
  kept.low = p.low;
  kept.options.temperature = 1;
  kept.gradient = true;
  kept.coef = coef.data;
  kept.entropy_coef = entropy_coef.data;
  kept.stored[0] = operand0.data;
  kept.stored[1] = operand1.data;
  kept.out = known.out;
  run(engine, kept, N);
  for (const Array<float>* x : {&dweight, &dbias}) x->written();

  dllm::HeadProblem drawn = p;
  drawn.target = nullptr;
  static_cast<dllm::Statistics&>(drawn) = {nullptr, lse.data, entropy.data, nullptr, nullptr};
  static_cast<dllm::Draw&>(drawn) = {key.data, 2, 0.8f, options ? temperature.data : nullptr, token.data, logp.data};
  run(engine, drawn, N);
  token.written();
  logp.written();

  // several targets of a row, of which two are equal, and its likeliest ids
  const int64_t each = 3, best = V - V / 5 < 4 ? V - V / 5 : 4;
  Array<int64_t> ids(N * each), best_id(N * best);
  Array<float> own(N * each), ids_logp(N * each), best_logp(N * best);
  for (int64_t i = 0; i < N * each; ++i) {
    ids.data[i] = i % 3 == 2 ? ids.data[i - 2] : i * 5 % V / 5 * 5;
    own.data[i] = number();
  }
  const auto with_ids = [&](dllm::HeadProblem q, const float* coefficients, const float* given) {
    static_cast<dllm::Several&>(q) = {true, each, coefficients, given};
    q.target = ids.data;
    return q;
  };
  dllm::HeadProblem scored = with_ids(p, nullptr, nullptr);
  static_cast<dllm::Statistics&>(scored) = {ids_logp.data, lse.data, entropy.data, top_logp.data, top_id.data, best_logp.data, best_id.data, best};
  run(engine, scored, N);
  for (const Array<float>* x : {&ids_logp, &best_logp}) x->written();
  best_id.written();
  scored.gradient = true;
  scored.out = {{nullptr, nullptr}, {nullptr, nullptr}, {operand0.data, operand1.data}, nullptr, nullptr, nullptr, 0, type, true, nullptr, 0};
  run(engine, scored, 32);
  for (const Array<char>* x : {&operand0, &operand1}) x->written();
  dllm::HeadProblem weighed = with_ids(known, own.data, nullptr);
  static_cast<dllm::Statistics&>(weighed) = {};
  run(engine, weighed, 32);
  vector0.written();
  run(engine, with_ids(kept, nullptr, own.data), N);
  for (const Array<float>* x : {&dweight, &dbias}) x->written();
  return 9;
}

// The passes over two slabs of logits, of all kinds.
int divergences(const dllm::Divergence& divergence, int64_t N, int64_t V, bool options) {
  Array<float> student(V * N), teacher(V * N), out(V * N), bias(V), of_rows(4 * N), squeeze(N);
  Array<uint8_t> excluded(V);
  Array<double> look(2 * dllm::kLookSums * N), mix(2 * dllm::kMixSums * N);
  for (int64_t i = 0; i < V * N; ++i) {
    student.data[i] = 3 * number();
    teacher.data[i] = 3 * number();
  }
  for (int64_t v = 0; v < V; ++v) {
    bias.data[v] = number();
    excluded.data[v] = v % 5 == 4;
  }
  for (int64_t i = 0; i < 4 * N; ++i) of_rows.data[i] = 1.5f + number();
  for (int64_t i = 0; i < N; ++i) squeeze.data[i] = 0.1f * number();
  const float *const one = of_rows.data, *const two = one + N, *const three = two + N, *const four = three + N;
  const auto together = [](auto body) { dllm::Team::run(1, [&](dllm::Team& team, int) { body(team); }); };
  int made = 0;
  for (float* z : {student.data, teacher.data}) {
    dllm::RawLogits raw{z, V, N, N, 0, {}};
    raw.options.temperature = 0.7f;
    if (options) raw.options = {bias.data, 3.0f, 1.0f, one, excluded.data};
    together([&](dllm::Team& team) { divergence.finish(raw, team); });
    ++made;
  }
  for (dllm::Kind kind : {dllm::Kind::forward_kl, dllm::Kind::reverse_kl, dllm::Kind::jsd}) {
    for (int64_t i = 0; i < look.count; ++i) look.data[i] = i / N % dllm::kLookSums % 2 == 0 && i / N % dllm::kLookSums < 4 ? -1e30 : 0;
    for (int64_t i = 0; i < mix.count; ++i) mix.data[i] = 0;
    const dllm::DivergenceSlab slab{student.data, teacher.data, V, N, kind, 0.3f, 0.7f, one, two};
    together([&](dllm::Team& team) { divergence.look(slab, look.data, 2, team); });
    together([&](dllm::Team& team) { divergence.mix(slab, mix.data, 2, team); });
    together([&](dllm::Team& team) { divergence.operand(slab, three, four, options ? squeeze.data : nullptr, out.data, team); });
    look.written();
    mix.written();
    out.written();
    made += 3;
  }
  return made;
}

// The passes over a slab of logits: two slabs after each other, results in memory of their own and in place.
int expectations(const dllm::Expectation& expectation, int64_t N, int64_t V, bool options) {
  const auto together = [](auto body) { dllm::Team::run(1, [&](dllm::Team& team, int) { body(team); }); };
  const int64_t parts = 2;
  Array<float> top(N), scale(N), part_top(parts * N), of_rows(4 * N);
  Array<double> sum(N), part_sum(parts * N);
  for (int64_t i = 0; i < N; ++i) {
    top.data[i] = -__builtin_inff();
    sum.data[i] = 0;
  }
  for (int64_t i = 0; i < 4 * N; ++i) of_rows.data[i] = 1.5f + number();
  for (int slab = 0; slab < 2; ++slab) {
    Array<float> z(V * N), out(V * N), pull(V * N), p(V * N);
    for (int64_t i = 0; i < V * N; ++i) {
      z.data[i] = options && i / N % 5 == 4 ? -__builtin_inff() : 3 * number();
      pull.data[i] = number();
    }
    const dllm::Softened softened{z.data, out.data, V, N, top.data, sum.data, scale.data, parts, part_top.data, part_sum.data};
    together([&](dllm::Team& team) { expectation.soften(softened, team); });
    for (const Array<float>* x : {&top, &scale, &out}) x->written();
    sum.written();
    const float *const inverse = of_rows.data, *const mean = inverse + N, *const factor = mean + N, *const squeeze = factor + N;
    dllm::Pulled pulled{z.data, pull.data, V, N, top.data, inverse, mean, factor, options ? squeeze : nullptr, p.data, out.data};
    together([&](dllm::Team& team) { expectation.pull(pulled, team); });
    p.written();
    out.written();
    pulled.p = z.data;
    pulled.out = pull.data;
    if (slab) pulled.pull = nullptr;
    together([&](dllm::Team& team) { expectation.pull(pulled, team); });
    z.written();
  }
  return 6;
}

}  // namespace

int main() {
  struct Named {
    const dllm::Engine* engine;
    const dllm::Divergence* divergence;
    const dllm::Expectation* expectation;
    bool pairs, here;
  };
  std::vector<Named> engines = {{&dllm::baseline::engine, &dllm::baseline::divergence, &dllm::baseline::expectation, false, true}};
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  engines.push_back({&dllm::avx2::engine, &dllm::avx2::divergence, &dllm::avx2::expectation, false, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
  engines.push_back({&dllm::avx512::engine, &dllm::avx512::divergence, &dllm::avx512::expectation, false, avx512});
  engines.push_back({&dllm::avx512bf16_emulated::engine, nullptr, nullptr, true, avx512});
#endif
  int made = 0;
  for (const Named& e : engines)
    for (Type type : {Type::f32, Type::bf16, Type::f16}) {
      if (!e.here || (e.pairs && type != Type::bf16)) continue;
      for (int64_t N : {1, 2, 3, 17, 33})
        for (int64_t H : {1, 7, 48})
          for (int64_t V : {1, 6, 33, 470})
            for (bool options : {false, true}) made += calls(*e.engine, type, N, H, V, options && V > 1);
    }
  for (const Named& e : engines)
    for (int64_t N : {1, 3, 16, 33, 300})
      for (int64_t V : {1, 6, 33, 470})
        for (bool options : {false, true})
          if (e.here && e.divergence) made += divergences(*e.divergence, N, V, options) + expectations(*e.expectation, N, V, options);
  std::printf("%d calls\n", made);
}
