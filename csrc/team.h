// The threads of one call. They are torch's own where its OpenMP runtime can be found in the process, so that the two never
// compete for the cores; else plain std::threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace dllm {

class Team {
 public:
  // Runs body(rank) on up to `threads` threads; `size()` tells how many came.
  template <class Body> static void run(int threads, Body body) {
    struct Job {
      Body& body;
      static void enter(void* self, Team& team, int rank) { static_cast<Job*>(self)->body(team, rank); }
    } job{body};
    launch(threads, &Job::enter, &job);
  }

  int size() const { return size_; }

  // The next piece of work of this phase; every thread asks until there is none.
  int64_t claim() { return size_ == 1 ? alone_++ : next_.fetch_add(1, std::memory_order_relaxed); }

  // Ends a phase: nobody goes on before everybody is here.
  void meet() {
    if (size_ == 1) {
      alone_ = 0;
      return;
    }
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      next_.store(0, std::memory_order_relaxed);
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) wait(spins);
  }

  static const char* runtime();  // "openmp" or "threads"

 private:
  using Enter = void (*)(void*, Team&, int);
  static void launch(int threads, Enter enter, void* job);
  static void wait(int spins);
  friend struct Launch;

  int size_ = 1;
  int64_t alone_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

}  // namespace dllm
