// Python's side of the expectation of an embedding: structs from addresses, which dllm_kernels/backends/expectation/engine.py
// has checked.
#include "expectation.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

namespace {

using dllm::Expectation;

const Expectation& (*engine)() = nullptr;

template <class T> T* address(uintptr_t a) { return reinterpret_cast<T*>(a); }

int team_size(int64_t logits, int64_t threads) {
  constexpr int64_t kWorth = 1 << 14;  // logits: below that a second thread costs more than it brings
  return (int)std::clamp<int64_t>(logits / kWorth, 1, std::max<int64_t>(1, threads));
}

void soften(uintptr_t z, uintptr_t out, int64_t columns, int64_t rows, uintptr_t top, uintptr_t sum, uintptr_t scale, int64_t threads) {
  const int64_t parts = std::clamp<int64_t>(columns / 64, 1, 8);
  std::vector<float> part_top((size_t)(parts * rows));
  std::vector<double> part_sum((size_t)(parts * rows));
  dllm::Softened p{};
  p.z = address<const float>(z);
  p.out = address<float>(out);
  p.columns = columns;
  p.rows = rows;
  p.top = address<float>(top);
  p.sum = address<double>(sum);
  p.scale = address<float>(scale);
  p.parts = parts;
  p.part_top = part_top.data();
  p.part_sum = part_sum.data();
  pybind11::gil_scoped_release release;
  dllm::Team::run(team_size(columns * rows, threads), [&](dllm::Team& team, int) { engine().soften(p, team); });
}

void pull(uintptr_t z, uintptr_t pull, int64_t columns, int64_t rows, uintptr_t top, uintptr_t inverse, uintptr_t mean, uintptr_t factor,
          uintptr_t squeeze, uintptr_t probabilities, uintptr_t out, int64_t threads) {
  dllm::Pulled p{};
  p.z = address<const float>(z);
  p.pull = address<const float>(pull);
  p.columns = columns;
  p.rows = rows;
  p.top = address<const float>(top);
  p.inverse = address<const float>(inverse);
  p.mean = address<const float>(mean);
  p.factor = address<const float>(factor);
  p.squeeze = address<const float>(squeeze);
  p.p = address<float>(probabilities);
  p.out = address<float>(out);
  pybind11::gil_scoped_release release;
  dllm::Team::run(team_size(columns * rows, threads), [&](dllm::Team& team, int) { engine().pull(p, team); });
}

}  // namespace

void bind_expectation(pybind11::module_& m, const Expectation& (*current)()) {
  engine = current;
  m.def("expectation_soften", &soften);
  m.def("expectation_pull", &pull);
}
