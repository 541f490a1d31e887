// The module dllm_kernels._C: picks the row kernel's ISA at run time and spreads rows over threads.
// Tensors come as addresses, sizes and strides; dllm_kernels/backends/cpu.py has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "row_problem.h"

void bind_noise(pybind11::module_& m);  // noise.cpp

namespace {

using dllm::RowProblem;

struct Isa {
  const char* name;
  dllm::RowKernel kernel;
  bool supported;
};

const std::vector<Isa>& isas() {  // best first
  static const std::vector<Isa> table = {
#if defined(__x86_64__)
      {"avx512", dllm::avx512::rows, __builtin_cpu_supports("avx512f") != 0},
      {"avx2", dllm::avx2::rows, __builtin_cpu_supports("avx2") != 0},
#endif
      {"baseline", dllm::baseline::rows, true},
  };
  return table;
}

std::atomic<const Isa*> current{nullptr};

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported) names.push_back(isa.name);
  return names;
}

void set_isa(const std::string& name) {
  std::string allowed;
  for (const Isa& isa : isas()) {
    if (!isa.supported) continue;
    if (isa.name == name) {
      current = &isa;
      return;
    }
    allowed += (allowed.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("isa: got '" + name + "', this machine allows " + allowed);
}

void run_rows(const RowProblem& p, int64_t threads) {
  const dllm::RowKernel kernel = current.load()->kernel;
  constexpr int64_t kWorth = 1 << 17;  // logits: below that a thread costs more than it brings
  const int64_t parts = std::max<int64_t>(1, std::min({threads, p.rows, p.rows * p.vocabulary / kWorth}));
  std::vector<std::thread> others;
  int64_t first = 0;
  for (int64_t k = 0; k < parts; ++k) {
    const int64_t last = p.rows * (k + 1) / parts;
    bool here = k + 1 == parts;
    if (!here) {
      try {
        others.emplace_back(kernel, std::cref(p), first, last);
      } catch (const std::system_error&) {  // no thread to be had: do its part here
        here = true;
      }
    }
    if (here) kernel(p, first, last);
    first = last;
  }
  for (std::thread& other : others) other.join();
}

template <class T> T* address(uintptr_t a) { return reinterpret_cast<T*>(a); }

void row_kernel(uintptr_t logits, int64_t rows, int64_t vocabulary, int64_t row_stride, uintptr_t target, uintptr_t bias,
                float softcap, float temperature, uintptr_t temperature_rows, uintptr_t excluded, uintptr_t coef,
                uintptr_t entropy_coef, uintptr_t entropy_operand, int64_t entropy_operand_stride, bool gradient,
                uintptr_t logp, uintptr_t lse, uintptr_t entropy, uintptr_t top_logp, uintptr_t top_id, int64_t threads) {
  pybind11::gil_scoped_release release;
  RowProblem p{};
  p.logits = address<float>(logits);
  p.rows = rows;
  p.vocabulary = vocabulary;
  p.row_stride = row_stride;
  p.target = address<const int64_t>(target);
  p.bias = address<const float>(bias);
  p.softcap = softcap;
  p.temperature = temperature;
  p.temperature_rows = address<const float>(temperature_rows);
  p.coef = address<const float>(coef);
  p.entropy_coef = address<const float>(entropy_coef);
  p.entropy_operand = gradient ? address<float>(entropy_operand) : nullptr;
  p.entropy_operand_stride = entropy_operand_stride;
  p.gradient = gradient;
  p.logp = address<float>(logp);
  p.lse = address<float>(lse);
  p.entropy = address<float>(entropy);
  p.top_logp = address<float>(top_logp);
  p.top_id = address<int64_t>(top_id);
  for (int64_t i = 0; i < rows; ++i)
    if (p.target[i] < 0 || p.target[i] >= vocabulary)
      throw std::out_of_range("target_N: row " + std::to_string(i) + " names class " + std::to_string(p.target[i]) +
                              ", allowed are 0 to " + std::to_string(vocabulary - 1));

  std::vector<uint16_t> mask;
  if (bias || excluded || temperature_rows || softcap != 0 || temperature != 1) {
    mask.assign((vocabulary + dllm::kLanes - 1) / dllm::kLanes, 0);
    if (vocabulary % dllm::kLanes) mask.back() = (uint16_t)(0xffffu << vocabulary % dllm::kLanes);
    if (const uint8_t* out = address<const uint8_t>(excluded))
      for (int64_t v = 0; v < vocabulary; ++v) mask[v / dllm::kLanes] |= (uint16_t)((out[v] != 0) << v % dllm::kLanes);
    p.excluded = mask.data();
  }
  run_rows(p, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "dllm-kernels: the CPU row kernel. Addresses are not checked here; use dllm_kernels.backends.cpu.";
  set_isa(supported_isas().front());
  bind_noise(m);
  m.def("row_kernel", &row_kernel);
  m.def("isa", [] { return std::string(current.load()->name); }, "The instruction set in use.");
  m.def("supported_isas", &supported_isas, "What this machine can run, best first.");
  m.def("set_isa", &set_isa, "Use this instruction set from now on; every one gives the same bits.");
}
