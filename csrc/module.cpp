// The module dllm_kernels._C: picks the instruction set at run time and hands one head call to it. Tensors come as addresses,
// sizes and strides; dllm_kernels/backends/cpu.py has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <string>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "divergence.h"
#include "expectation.h"
#include "head_problem.h"

void bind_noise(pybind11::module_& m);  // noise.cpp
void bind_divergence(pybind11::module_& m, const dllm::Divergence& (*current)());  // divergence.cpp
void bind_expectation(pybind11::module_& m, const dllm::Expectation& (*current)());  // expectation.cpp

namespace {

using dllm::HeadProblem;
using dllm::Type;

struct Isa {
  const char* name;
  bool supported;
  const dllm::Engine* engine;
  const dllm::Engine* pairs;  // for bfloat16 problems, or null
  const dllm::Divergence* divergence;
  const dllm::Expectation* expectation;

  const dllm::Engine& of(const HeadProblem& p) const {
    const bool fits = p.hidden.type == Type::bf16 && p.weight.type == Type::bf16 && p.hidden.column == 1 && p.weight.column == 1;
    return pairs && fits ? *pairs : *engine;
  }
};

const std::vector<Isa>& isas() {  // best first; what is only for tests last
  static const std::vector<Isa> table = [] {
    std::vector<Isa> t;
#if defined(__x86_64__)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    t.push_back({"avx512bf16", avx512 && __builtin_cpu_supports("avx512bf16"), &dllm::avx512::engine, &dllm::avx512bf16::engine, &dllm::avx512::divergence, &dllm::avx512::expectation});
    t.push_back({"avx512", avx512, &dllm::avx512::engine, nullptr, &dllm::avx512::divergence, &dllm::avx512::expectation});
    // On Emerald Rapids a product of pairs takes 1.6 x as long as one of single floats, and the head with pairs 1.6 to 1.9 x
    if (__builtin_cpu_is("intel")) std::swap(t[0], t[1]);
    t.push_back({"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &dllm::avx2::engine, nullptr,
                 &dllm::avx2::divergence, &dllm::avx2::expectation});
#endif
    t.push_back({"baseline", true, &dllm::baseline::engine, nullptr, &dllm::baseline::divergence, &dllm::baseline::expectation});
#if defined(__x86_64__)
    t.push_back({"avx512bf16-emulated", avx512, &dllm::avx512::engine, &dllm::avx512bf16_emulated::engine, &dllm::avx512::divergence, &dllm::avx512::expectation});
#endif
    return t;
  }();
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

// What tests fill a workspace with before a call, to see that nothing is read that the call has not written.
std::atomic<bool> poisoned{false};
std::atomic<float> poison{0};
void fill(void* data, size_t bytes) {
  if (poisoned) std::fill_n(static_cast<float*>(data), bytes / sizeof(float), poison.load());
}

constexpr size_t kHugePage = size_t{1} << 21;

// Fresh memory. `kept`: in huge pages, which every later call gains by. What lives for one call is left in small ones: a huge one
// that a hypervisor has taken back costs several times as much to touch first as the small ones that make it up.
void* allocate(size_t bytes, bool kept = false) {
  const size_t alignment = kept && bytes >= 2 * kHugePage ? kHugePage : 64;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  void* data = std::aligned_alloc(alignment, bytes);
  if (!data) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (alignment == kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

// One workspace is kept from call to call, since fresh pages cost more than many a call; a second concurrent call brings
// its own.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : lock_(mutex(), std::try_to_lock) {
    acquire(bytes);
    fill(data_, bytes);
  }
  ~Workspace() { std::free(own_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  float* data() const { return static_cast<float*>(data_); }

  static void release() {
    std::lock_guard<std::mutex> lock(mutex());
    std::free(shared().data);
    shared() = {};
  }

 private:
  struct Kept {
    void* data = nullptr;
    size_t bytes = 0;
  };
  void acquire(size_t bytes) {
    if (!lock_.owns_lock()) {
      data_ = own_ = allocate(bytes);
      return;
    }
    Kept& kept = shared();
    if (kept.bytes < bytes) {
      std::free(kept.data);
      kept = {};
      kept.data = allocate(bytes, true);
      kept.bytes = bytes;
    }
    data_ = kept.data;
  }
  static std::mutex& mutex() {
    static std::mutex m;
    return m;
  }
  static Kept& shared() {
    static Kept k;
    return k;
  }

  std::unique_lock<std::mutex> lock_;
  void *data_ = nullptr, *own_ = nullptr;
};

constexpr int64_t kMaxChunk = 1024;  // rows: packed hidden states and weights meet often enough
constexpr int64_t kLeastChunk = 256;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Equal chunks of whole panels; where logits are kept, within the budget.
int64_t chunk_rows(int64_t rows, int64_t vocabulary, bool keeps_logits, int64_t best, int panel, int64_t budget) {
  int64_t most = kMaxChunk;
  const auto fit = [&](int64_t bytes) { most = std::min(most, std::clamp(budget / bytes / panel * panel, kLeastChunk, kMaxChunk)); };
  if (keeps_logits) fit(4 * vocabulary);
  if (best) fit(512 * best);  // of up to 64 parts of the vocabulary
  const int64_t chunks = std::max<int64_t>(1, (rows + most - 1) / most);
  return round_up(std::max<int64_t>(1, (rows + chunks - 1) / chunks), panel);
}

int team_size(const HeadProblem& p, int64_t threads) {
  constexpr double kWorth = 1 << 21;  // multiply-adds: below that a second thread costs more than it brings
  const double work = (double)p.rows * (double)p.width * (double)p.vocabulary;
  return (int)std::clamp<double>(work / kWorth, 1, (double)std::max<int64_t>(1, threads));
}

template <class T> T* address(uintptr_t a) { return reinterpret_cast<T*>(a); }

// The bytes in which a 16-bit weight's gradient is added up over chunks of rows.
size_t sum_bytes(const HeadProblem& p) {
  return p.out.rounded && p.rows > p.chunk ? (size_t)p.vocabulary * (size_t)p.out.dweight_row * sizeof(float) : 0;
}

void run(HeadProblem& p, int64_t threads, int64_t budget) {
  if (p.rows == 0) return;
  const dllm::Engine& engine = current.load()->of(p);
  const bool stored = p.stored[0] || p.stored[1];
  p.chunk = chunk_rows(p.rows, p.vocabulary, p.gradient && !stored, p.best, engine.panel, budget);
  const int size = team_size(p, threads);
  const size_t bytes = sum_bytes(p);
  const std::unique_ptr<void, void (*)(void*)> sums(bytes ? allocate(bytes) : nullptr, std::free);
  if (sums) {
    fill(sums.get(), bytes);
    p.out.dweight = static_cast<float*>(sums.get());
  }
  Workspace workspace((size_t)engine.workspace(p, size) * sizeof(float));
  dllm::Team::run(size, [&](dllm::Team& team, int rank) { engine.head(p, team, rank, workspace.data()); });
}

// A strided [*, *] tensor: (address, type, row stride, column stride).
using Strided = std::tuple<uintptr_t, int, int64_t, int64_t>;

dllm::Matrix matrix(const Strided& s) {
  return {address<const void>(std::get<0>(s)), static_cast<Type>(std::get<1>(s)), std::get<2>(s), std::get<3>(s)};
}

// Constructors of the structs of head_problem.h, from addresses; 0 is null.
dllm::Operands operands(const Strided& hidden, const Strided& weight, uintptr_t index, int64_t rows, int64_t vocabulary, int64_t width) {
  return {matrix(hidden), matrix(weight), address<const int64_t>(index), rows, vocabulary, width};
}

dllm::LowRank low_rank(const Strided& hidden, const Strided& weight, int64_t rank) { return {matrix(hidden), matrix(weight), rank}; }

dllm::Options options(uintptr_t bias, float softcap, float temperature, uintptr_t temperature_rows, uintptr_t excluded) {
  return {address<const float>(bias), softcap, temperature, address<const float>(temperature_rows), address<const uint8_t>(excluded)};
}

dllm::Statistics statistics(uintptr_t logp, uintptr_t lse, uintptr_t entropy, uintptr_t top_logp, uintptr_t top_id,
                            uintptr_t best_logp, uintptr_t best_id, int64_t best) {
  return {address<float>(logp), address<float>(lse), address<float>(entropy), address<float>(top_logp), address<int64_t>(top_id),
          address<float>(best_logp), address<int64_t>(best_id), best};
}

dllm::Draw draw(uintptr_t key, uint32_t step, float temperature, uintptr_t temperature_of, uintptr_t token, uintptr_t token_logp) {
  return {temperature > 0 ? address<const int64_t>(key) : nullptr, step, temperature, address<const float>(temperature_of),
          address<int64_t>(token), address<float>(token_logp)};
}

// `each` below 0: one target per row.
dllm::Several several(int64_t each, uintptr_t own, uintptr_t given) {
  return {each >= 0, each < 0 ? 1 : each, address<const float>(own), address<const float>(given)};
}

using Addresses = std::pair<uintptr_t, uintptr_t>;

// `rounded`: `dweight` has the 16-bit type of the problem.
dllm::Gradients gradients(const Addresses& vectors, const Addresses& low_vectors, const Addresses& operands, uintptr_t dweight, bool rounded,
                          int64_t dweight_row, uintptr_t dbias, uintptr_t dlow, int64_t dlow_row, bool overwrite) {
  return {{address<void>(vectors.first), address<void>(vectors.second)},
          {address<float>(low_vectors.first), address<float>(low_vectors.second)},
          {address<void>(operands.first), address<void>(operands.second)},
          address<float>(rounded ? 0 : dweight), address<void>(rounded ? dweight : 0), address<float>(dbias), dweight_row, Type::f32, overwrite, address<float>(dlow), dlow_row};
}

using Coefficients = std::pair<uintptr_t, uintptr_t>;  // of logp and of entropy, or of two stored operands

HeadProblem problem(const dllm::Operands& operands, const dllm::LowRank& low, const Coefficients& coef, const dllm::Gradients& out) {
  HeadProblem p{};
  static_cast<dllm::Operands&>(p) = operands;
  p.low = low;
  p.options.temperature = 1;
  p.coef = address<const float>(coef.first);
  p.entropy_coef = address<const float>(coef.second);
  p.out = out;
  p.out.type = p.hidden.type;
  return p;
}

void head(const dllm::Operands& operands, const dllm::LowRank& low, const dllm::Options& options, uintptr_t target, const dllm::Several& several,
          const dllm::Statistics& statistics, bool gradient, const Coefficients& coef, const dllm::Gradients& out, int64_t threads,
          int64_t budget) {
  pybind11::gil_scoped_release release;
  HeadProblem p = problem(operands, low, coef, out);
  static_cast<dllm::Statistics&>(p) = statistics;
  static_cast<dllm::Several&>(p) = several;
  p.options = options;
  p.target = address<const int64_t>(target);
  p.gradient = gradient;
  run(p, threads, budget);
}

void from_operands(const dllm::Operands& operands, const dllm::LowRank& low, uintptr_t target, const dllm::Several& several, const Addresses& stored,
                   const Coefficients& coef, const dllm::Gradients& out, int64_t threads) {
  pybind11::gil_scoped_release release;
  HeadProblem p = problem(operands, low, coef, out);
  static_cast<dllm::Several&>(p) = several;
  p.target = address<const int64_t>(target);
  p.gradient = true;
  p.stored[0] = address<const void>(stored.first);
  p.stored[1] = address<const void>(stored.second);
  run(p, threads, 0);
}

void sample(const dllm::Operands& operands, const dllm::LowRank& low, const dllm::Options& options, const dllm::Statistics& statistics,
            const dllm::Draw& draw, int64_t threads) {
  pybind11::gil_scoped_release release;
  HeadProblem p = problem(operands, low, {}, {});
  static_cast<dllm::Statistics&>(p) = statistics;
  static_cast<dllm::Draw&>(p) = draw;
  p.options = options;
  run(p, threads, 0);
}

// Whether every target is a class that is not excluded, and the row indices are distinct and there.
bool values_fit(uintptr_t target, int64_t targets, uintptr_t index, int64_t rows, int64_t available, int64_t vocabulary, uintptr_t excluded) {
  pybind11::gil_scoped_release release;
  if (const int64_t* t = address<const int64_t>(target)) {
    const uint8_t* out = address<const uint8_t>(excluded);
    for (int64_t i = 0; i < targets; ++i)
      if (t[i] < 0 || t[i] >= vocabulary || (out && out[t[i]])) return false;
  }
  if (const int64_t* at = address<const int64_t>(index)) {
    std::vector<bool> seen((size_t)available);
    for (int64_t i = 0; i < rows; ++i) {
      if (at[i] < 0 || at[i] >= available || seen[(size_t)at[i]]) return false;
      seen[(size_t)at[i]] = true;
    }
  }
  return true;
}

// The bytes that a call of `head` works in, beyond its arguments.
int64_t workspace_bytes(int64_t rows, int64_t vocabulary, int64_t width, int type, int64_t rank, int low_type, bool gradient, bool dweight,
                        bool dhidden, bool second, bool dlow, int64_t each, int64_t best, int64_t threads, int64_t budget) {
  const dllm::LowRank low = low_rank({1, 0, 1, 1}, {1, low_type, 1, 1}, rank);
  HeadProblem p = problem(operands({1, type, 1, 1}, {1, type, 1, 1}, 0, rows, vocabulary, width), low, {}, {});
  const dllm::Engine& engine = current.load()->of(p);
  static_cast<dllm::Several&>(p) = several(each, 0, 0);
  p.best = best;
  p.gradient = gradient;
  p.out.dweight = address<float>(dweight ? 1 : 0);
  p.out.dlow = address<float>(dlow ? 1 : 0);
  p.out.vectors[0] = address<void>(dhidden ? 1 : 0);
  p.out.vectors[1] = address<void>(second && !dweight ? 1 : 0);  // where the head trains, `coef` joins them to one and `keep` makes them in backward
  p.chunk = chunk_rows(rows, vocabulary, gradient, best, engine.panel, budget);
  return engine.workspace(p, team_size(p, threads)) * (int64_t)sizeof(float);
}

// The bytes that the gradient of a weight of `type` is added up in, beyond itself. `stored`: from operands.
int64_t weight_sum_bytes(int64_t rows, int64_t vocabulary, int64_t width, int type, bool stored, int64_t budget) {
  HeadProblem p = problem(operands({1, type, 1, 1}, {1, type, 1, 1}, 0, rows, vocabulary, width), {}, {}, {});
  p.chunk = chunk_rows(rows, vocabulary, !stored, 0, current.load()->of(p).panel, budget);
  p.out.rounded = address<void>(type != static_cast<int>(Type::f32));
  p.out.dweight_row = width;
  return (int64_t)sum_bytes(p);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "dllm-kernels: the CPU head engine. Addresses are not checked here; use dllm_kernels.backends.cpu.";
  set_isa(supported_isas().front());
  bind_noise(m);
  bind_divergence(m, []() -> const dllm::Divergence& { return *current.load()->divergence; });
  bind_expectation(m, []() -> const dllm::Expectation& { return *current.load()->expectation; });
  namespace py = pybind11;
  py::class_<dllm::Operands>(m, "Operands").def(py::init(&operands));
  py::class_<dllm::LowRank>(m, "LowRank").def(py::init(&low_rank)).def(py::init([] { return dllm::LowRank{}; }));
  py::class_<dllm::Options>(m, "Options").def(py::init(&options));
  py::class_<dllm::Statistics>(m, "Statistics").def(py::init(&statistics));
  py::class_<dllm::Draw>(m, "Draw").def(py::init(&draw));
  py::class_<dllm::Several>(m, "Several").def(py::init(&several));
  py::class_<dllm::Gradients>(m, "Gradients").def(py::init(&gradients));
  m.def("head", &head);
  m.def("from_operands", &from_operands);
  m.def("sample", &sample);
  m.def("values_fit", &values_fit);
  m.def("workspace_bytes", &workspace_bytes);
  m.def("sum_bytes", &weight_sum_bytes);
  m.def("release_workspace", &Workspace::release, "Gives the kept workspace back to the system.");
  m.def("poison_workspace", [](std::optional<float> value) {
    if (value) poison = *value;
    poisoned = value.has_value();
  }, "For tests: every call finds this number all over its workspace; None ends it.");
  m.def("isa", [] { return std::string(current.load()->name); }, "The instruction set in use.");
  m.def("supported_isas", &supported_isas, "What this machine can run, best first.");
  m.def("set_isa", &set_isa, "Use this instruction set from now on.");
  m.def("thread_runtime", [] { return std::string(dllm::Team::runtime()); }, "Where threads come from: openmp (torch's own) or threads.");
}
