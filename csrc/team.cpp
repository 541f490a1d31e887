#include "team.h"

#include <sched.h>

#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace dllm {

namespace {

// The entry points of GCC's OpenMP ABI, which LLVM's and Intel's runtimes offer too.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread)() = nullptr;
  int (*threads)() = nullptr;
  bool found() const { return parallel && thread && threads; }
};

const OpenMp& openmp() {
  static const OpenMp runtime = [] {
    OpenMp r;
#if defined(__linux__) || defined(__APPLE__)
    // torch loads its runtime into the global scope; where it does not, ask for it by name without loading anything
    void* scopes[] = {RTLD_DEFAULT, dlopen("libgomp.so.1", RTLD_NOW | RTLD_NOLOAD), dlopen("libiomp5.so", RTLD_NOW | RTLD_NOLOAD),
                      dlopen("libomp.dylib", RTLD_NOW | RTLD_NOLOAD)};
    for (void* scope : scopes) {
      if (!scope && scope != RTLD_DEFAULT) continue;
      r.parallel = reinterpret_cast<decltype(r.parallel)>(dlsym(scope, "GOMP_parallel"));
      r.thread = reinterpret_cast<decltype(r.thread)>(dlsym(scope, "omp_get_thread_num"));
      r.threads = reinterpret_cast<decltype(r.threads)>(dlsym(scope, "omp_get_num_threads"));
      if (r.found()) break;
    }
#endif
    return r;
  }();
  return runtime;
}

}  // namespace

struct Launch {
  Team team;
  Team::Enter enter;
  void* job;

  static void from_openmp(void* self) {
    Launch& l = *static_cast<Launch*>(self);
    const int rank = openmp().thread();
    // the runtime may give fewer threads than were asked for; all must know before anyone starts
    if (rank == 0) {
      l.team.size_ = openmp().threads();
      l.ready.store(true, std::memory_order_release);
    }
    for (int spins = 0; !l.ready.load(std::memory_order_acquire); ++spins) Team::wait(spins);
    l.enter(l.job, l.team, rank);
  }

  std::atomic<bool> ready{false};
};

void Team::wait(int spins) {
  if (spins < 4096) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  } else {
    sched_yield();
  }
}

const char* Team::runtime() { return openmp().found() ? "openmp" : "threads"; }

void Team::launch(int threads, Enter enter, void* job) {
  Launch l;
  l.enter = enter;
  l.job = job;
  if (threads <= 1) {
    enter(job, l.team, 0);
    return;
  }
  if (openmp().found()) {
    openmp().parallel(&Launch::from_openmp, &l, (unsigned)threads, 0);
    return;
  }
  std::vector<std::thread> others;
  for (int rank = 1; rank < threads; ++rank) {
    try {
      others.emplace_back([&l, rank] {
        for (int spins = 0; !l.ready.load(std::memory_order_acquire); ++spins) wait(spins);
        l.enter(l.job, l.team, rank);
      });
    } catch (const std::system_error&) {  // no more threads to be had: those that came do the work
      break;
    }
  }
  l.team.size_ = (int)others.size() + 1;
  l.ready.store(true, std::memory_order_release);
  enter(job, l.team, 0);
  for (std::thread& other : others) other.join();
}

}  // namespace dllm
