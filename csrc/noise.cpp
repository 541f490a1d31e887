// Philox4x32-10 and selection by it: the C++ forms of dllm_kernels/noise.py, which has checked what the addresses hold.
// Integers only, so every instruction set gives the same bits; the compiler vectorises the loops over lanes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <vector>

// One copy per instruction set, chosen by the loader: needs ifunc, that is glibc.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define DLLM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef DLLM_CLONES
#define DLLM_CLONES
#endif

namespace {

constexpr int64_t kLanes = 64;  // counters in flight: four arrays of 256 bytes

struct Counters {
  alignas(64) uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
};

DLLM_CLONES void philox(Counters& counters, uint32_t key0, uint32_t key1) {
  for (int i = 0; i < kLanes; ++i) {
    uint32_t c0 = counters.c0[i], c1 = counters.c1[i], c2 = counters.c2[i], c3 = counters.c3[i];
    uint32_t k0 = key0, k1 = key1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
      c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
      c1 = (uint32_t)p1;
      c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
      c3 = (uint32_t)p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    counters.c0[i] = c0;
    counters.c1[i] = c1;
    counters.c2[i] = c2;
    counters.c3[i] = c3;
  }
}

template <class T> T* address(uintptr_t a) { return reinterpret_cast<T*>(a); }

// Row keys of a broadcast shape: out is contiguous, the three inputs are int64 with strides (0 where they broadcast).
void row_bits(uint32_t seed, uint32_t stream, uintptr_t sequence, uintptr_t sample, uintptr_t position, std::vector<int64_t> sizes,
              std::vector<int64_t> sequence_strides, std::vector<int64_t> sample_strides, std::vector<int64_t> position_strides,
              uintptr_t out_address) {
  pybind11::gil_scoped_release release;
  const int64_t dims = (int64_t)sizes.size();
  int64_t total = 1;
  for (int64_t size : sizes) total *= size;
  if (total == 0) return;
  const int64_t inner = dims ? sizes[dims - 1] : 1;
  const int64_t ds = dims ? sequence_strides[dims - 1] : 0, dk = dims ? sample_strides[dims - 1] : 0,
                dp = dims ? position_strides[dims - 1] : 0;
  std::vector<int64_t> index(dims, 0);
  const int64_t *s = address<const int64_t>(sequence), *k = address<const int64_t>(sample), *p = address<const int64_t>(position);
  int64_t at = 0;  // within the inner dimension
  Counters counters{};
  int64_t* out = address<int64_t>(out_address);
  for (int64_t done = 0; done < total; done += kLanes) {
    const int64_t lanes = std::min(kLanes, total - done);
    for (int64_t lane = 0; lane < lanes;) {
      const int64_t run = std::min(lanes - lane, inner - at);
      for (int64_t i = 0; i < run; ++i) {
        const uint64_t id = (uint64_t)s[(at + i) * ds];
        counters.c0[lane + i] = (uint32_t)id;
        counters.c1[lane + i] = (uint32_t)(id >> 32);
        counters.c2[lane + i] = (uint32_t)k[(at + i) * dk];
        counters.c3[lane + i] = (uint32_t)p[(at + i) * dp];
      }
      lane += run;
      at += run;
      if (at < inner) continue;
      at = 0;
      for (int64_t d = dims - 2; d >= 0; --d) {
        s += sequence_strides[d];
        k += sample_strides[d];
        p += position_strides[d];
        if (++index[d] < sizes[d]) break;
        index[d] = 0;
        s -= sizes[d] * sequence_strides[d];
        k -= sizes[d] * sample_strides[d];
        p -= sizes[d] * position_strides[d];
      }
    }
    philox(counters, seed, stream);
    for (int64_t i = 0; i < lanes; ++i) out[done + i] = (int64_t)((uint64_t)counters.c1[i] << 32 | counters.c0[i]);
  }
}

// Words of the tokens 0..tokens-1 under each row's key: out [rows, tokens], int64 in [0, 2^32).
void element_bits(uintptr_t keys, int64_t rows, int64_t tokens, uintptr_t steps, int64_t step_stride, uint32_t tag,
                  uintptr_t out_address) {
  pybind11::gil_scoped_release release;
  Counters counters{};
  for (int64_t row = 0; row < rows; ++row) {
    const uint64_t key = address<const uint64_t>(keys)[row];
    const uint32_t step = (uint32_t)address<const int64_t>(steps)[row * step_stride];
    int64_t* out = address<int64_t>(out_address) + row * tokens;
    for (int64_t first = 0; first < tokens; first += 4 * kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        counters.c0[i] = (uint32_t)(first / 4 + i);
        counters.c1[i] = step;
        counters.c2[i] = 0;
        counters.c3[i] = tag;
      }
      philox(counters, (uint32_t)key, (uint32_t)(key >> 32));
      const int64_t count = std::min(4 * kLanes, tokens - first);
      for (int64_t v = 0; v < count; ++v) {
        const uint32_t* word = v % 4 == 0 ? counters.c0 : v % 4 == 1 ? counters.c1 : v % 4 == 2 ? counters.c2 : counters.c3;
        out[first + v] = word[v / 4];
      }
    }
  }
}

// In each of the outer x inner rows of bits, `count` entries with the smallest bits (signed, ties by position) where among.
void smallest(uintptr_t bits_address, uintptr_t among_address, int64_t among_outer, int64_t among_inner, uintptr_t counts, int64_t outer,
              int64_t inner, int64_t width, uintptr_t out_address) {
  pybind11::gil_scoped_release release;
  constexpr int64_t kBuckets = 256;
  std::vector<uint64_t> bucket;
  for (int64_t row = 0; row < outer * inner; ++row) {
    const int64_t* bits = address<const int64_t>(bits_address) + row * width;
    const uint8_t* among = address<const uint8_t>(among_address) + row / inner * among_outer + row % inner * among_inner;
    uint8_t* out = address<uint8_t>(out_address) + row * width;
    int64_t wanted = address<const int64_t>(counts)[row];
    const auto ordered = [&](int64_t i) { return (uint64_t)bits[i] ^ (uint64_t)1 << 63; };  // unsigned order is signed order
    int64_t sizes[kBuckets] = {}, available = 0;
    for (int64_t i = 0; i < width; ++i) {
      sizes[ordered(i) >> 56] += among[i];
      available += among[i];
    }
    if (wanted <= 0 || wanted >= available) {
      for (int64_t i = 0; i < width; ++i) out[i] = wanted > 0 ? among[i] : 0;
      continue;
    }
    int64_t b = 0;  // the bucket by top byte that holds the last entry to take
    while (wanted > sizes[b]) wanted -= sizes[b++];
    bucket.clear();
    for (int64_t i = 0; i < width; ++i)
      if (among[i] && (int64_t)(ordered(i) >> 56) == b) bucket.push_back(ordered(i));
    std::nth_element(bucket.begin(), bucket.begin() + (wanted - 1), bucket.end());
    const uint64_t last = bucket[wanted - 1];
    const int64_t ties = wanted - std::count_if(bucket.begin(), bucket.end(), [&](uint64_t x) { return x < last; });
    for (int64_t i = 0; i < width; ++i) out[i] = among[i] & (uint8_t)(ordered(i) <= last);
    if (ties == std::count(bucket.begin(), bucket.end(), last)) continue;
    for (int64_t i = 0, left = ties; i < width; ++i)
      if (among[i] && ordered(i) == last) out[i] = left-- > 0;
  }
}

}  // namespace

void bind_noise(pybind11::module_& m) {
  m.def("row_bits", &row_bits);
  m.def("element_bits", &element_bits);
  m.def("smallest", &smallest);
}
