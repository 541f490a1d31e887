// Python's side of the divergence of two heads: structs from addresses, which dllm_kernels/backends/divergence_cpu.py has checked.
#include "divergence.h"

#include <pybind11/pybind11.h>

#include <algorithm>

namespace {

using dllm::Divergence;
using dllm::DivergenceSlab;
using dllm::RawLogits;

const Divergence& (*engine)() = nullptr;

template <class T> T* address(uintptr_t a) { return reinterpret_cast<T*>(a); }

template <class Body> void together(int64_t logits, int64_t threads, Body body) {
  constexpr int64_t kWorth = 1 << 14;  // logits: below that a second thread costs more than it brings
  pybind11::gil_scoped_release release;
  dllm::Team::run((int)std::clamp<int64_t>(logits / kWorth, 1, std::max<int64_t>(1, threads)), body);
}

RawLogits raw_logits(uintptr_t z, int64_t columns, int64_t rows, int64_t pitch, int64_t first, const dllm::Options& options) {
  return {address<float>(z), columns, rows, pitch, first, options};
}

DivergenceSlab slab(uintptr_t student, uintptr_t teacher, int64_t columns, int64_t rows, int kind, double beta, uintptr_t student_lse,
                    uintptr_t teacher_lse) {
  return {address<const float>(student), address<const float>(teacher), columns, rows, static_cast<dllm::Kind>(kind), (float)beta, (float)(1 - beta),
          address<const float>(student_lse), address<const float>(teacher_lse)};
}

void finish(const RawLogits& p, int64_t threads) {
  together(p.columns * p.rows, threads, [&](dllm::Team& team, int) { engine().finish(p, team); });
}

void look(const DivergenceSlab& p, uintptr_t sums, int64_t parts, int64_t threads) {
  together(p.columns * p.rows, threads, [&](dllm::Team& team, int) { engine().look(p, address<double>(sums), parts, team); });
}

void mix(const DivergenceSlab& p, uintptr_t sums, int64_t parts, int64_t threads) {
  together(p.columns * p.rows, threads, [&](dllm::Team& team, int) { engine().mix(p, address<double>(sums), parts, team); });
}

void operand(const DivergenceSlab& p, uintptr_t mean, uintptr_t factor, uintptr_t squeeze, uintptr_t out, int64_t threads) {
  together(p.columns * p.rows, threads, [&](dllm::Team& team, int) {
    engine().operand(p, address<const float>(mean), address<const float>(factor), address<const float>(squeeze), address<float>(out), team);
  });
}

}  // namespace

void bind_divergence(pybind11::module_& m, const Divergence& (*current)()) {
  engine = current;
  namespace py = pybind11;
  py::class_<RawLogits>(m, "RawLogits").def(py::init(&raw_logits));
  py::class_<DivergenceSlab>(m, "DivergenceSlab").def(py::init(&slab));
  m.def("finish_logits", &finish);
  m.def("divergence_look", &look);
  m.def("divergence_mix", &mix);
  m.def("divergence_operand", &operand);
}
