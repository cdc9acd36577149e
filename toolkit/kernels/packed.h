// What the updates share: rules, gathering survivors and putting them back, and the walk over all blocks.
//
// A block of 1,024 weights is worked on in three passes: the survivors' weights and gradients are gathered side by side
// (their moments already lie so), updated as plain vectors, and put back. Arithmetic then costs what the survivors cost,
// whatever the density; a gather costs a few cycles per 16 weights. Above 85 % density blocks are mostly full and the
// gather is still the cheaper half of the work, so one code serves all densities. Putting back writes whole lines, zeros
// at the pruned places: weights written from outside (a loaded model, an average) are pruned again by the next step.
//
// Weights and gradients in bfloat16 are floats while their block is worked on, and are then rounded by chance: the same
// bits as toolkit.kernels.rounding.
//
// Plain C interface, no torch headers: builds in about 2 s. OpenMP shares torch's thread pool (same libgomp).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t BLOCK = 1024;
// Weights to fetch ahead. A block is one 4 KiB page of weights, where the processor's own prefetch ends: with it the
// update at 90 % sparsity went from 0.64 to 0.53 of fused AdamW's time (512 to 8192 are alike). Weights are fetched while
// gathering and gradients while putting back, so that memory has work in both passes, and into the second cache, for the
// first one's few slots are those of the passes themselves: on Zen 4 from 88 to 100 % of the rate in place at 70 %.
constexpr int64_t AHEAD = 2048;
enum Isa { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

// A table row is one tensor: weights, addresses of weight, grad, mask (0: dense), offsets, three moments and, where they
// are codes, their exponents; the seed of what is rounded by chance, the first weight's place in the whole parameter.
constexpr int64_t ROW = 13;
constexpr int WEIGHT = 1, GRAD = 2, MASK = 3, OFFSETS = 4, MOMENT = 5, EXPONENTS = 8, SEED = 11, FIRST = 12;

struct Adam {
  float decay, one_minus_beta1, beta2, one_minus_beta2, inv_bias2_sqrt, eps, step_size, coupled;
};

struct Sgd {
  float decay, momentum, one_minus_dampening, lr, coupled;
  int nesterov, first;
};

#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE

INLINE float root(float x) { return sqrtf(x); }
INLINE float quotient(float x, float y) { return x / y; }

// Of vectors, by two steps of Newton from a guess read off the bits: the processor's own root and division share a unit,
// which bounds an update whose moments are narrow. Together they are off by at most 1.2e-5 of the update.
template <class Floats>
INLINE Floats root(Floats x) {
  using Ints = decltype(x > x);
  const Floats half = x * 0.5f;
  Floats y = (Floats)(0x5F3759DF - ((Ints)x >> 1));
  for (int i = 0; i < 2; ++i) y = y * (1.5f - half * y * y);
  return x <= 3.4028235e38f ? x * y : x;  // infinity stays what it is
}

template <class Floats>
INLINE Floats quotient(Floats x, Floats y) {
  using Ints = decltype(y > y);
  Floats inverse = (Floats)(0x7EF311C7 - (Ints)y);
  for (int i = 0; i < 2; ++i) inverse = inverse * (2.0f - y * inverse);
  return x * inverse;
}

// The rules of one weight, or of several at once: T is float or a vector of them. They return the new weight.
template <class T>
INLINE void adam_moments(const Adam& a, T w, T g, T& m, T& v, T* vmax) {
  const T grad = g + a.coupled * w;
  m = m + (grad - m) * a.one_minus_beta1;
  v = v * a.beta2 + grad * grad * a.one_minus_beta2;
  if (vmax) *vmax = *vmax > v ? *vmax : v;
}

template <class T>
INLINE T adam_value(const Adam& a, T w, T g, T& m, T& v, T* vmax) {
  adam_moments(a, w, g, m, v, vmax);
  return w * a.decay - a.step_size * quotient(m, root(vmax ? *vmax : v) * a.inv_bias2_sqrt + a.eps);
}

template <class T>
INLINE T sgd_value(const Sgd& s, T w, T g, T& m) {
  const T grad = g + s.coupled * w;
  m = s.first ? grad : m * s.momentum + grad * s.one_minus_dampening;
  return w * s.decay - s.lr * (s.nesterov ? grad + s.momentum * m : m);
}

INLINE void adam_rule(const Adam& a, int n, float* __restrict w, const float* __restrict g, float* __restrict m,
                      float* __restrict v, float* __restrict vmax) {
  for (int i = 0; i < n; ++i) w[i] = adam_value(a, w[i], g[i], m[i], v[i], vmax ? vmax + i : nullptr);
}

INLINE void sgd_rule(const Sgd& s, int n, float* __restrict w, const float* __restrict g, float* __restrict m) {
  for (int i = 0; i < n; ++i) w[i] = sgd_value(s, w[i], g[i], m[i]);
}

INLINE uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

INLINE float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

INLINE uint32_t hash(uint32_t x) {  // lowbias32, as toolkit.kernels.rounding
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

INLINE uint32_t with_noise(uint32_t bits, uint32_t noise) {  // infinity and NaN stay what they are
  return bits + ((bits & 0x7F800000u) == 0x7F800000u ? 0u : noise);
}

INLINE void widen_bfloat16(float* to, const uint16_t* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = float_of_bits(static_cast<uint32_t>(from[i]) << 16);
}

INLINE void round_bfloat16(uint16_t* to, const float* from, int64_t n, uint32_t seed) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t noise = hash(seed + static_cast<uint32_t>(i)) & 0xFFFFu;
    to[i] = static_cast<uint16_t>(with_noise(bits_of_float(from[i]), noise) >> 16);
  }
}

INLINE uint64_t bits_of(const uint8_t* mask, int64_t count) {
  uint64_t bits = 0;
  if (count == 64) std::memcpy(&bits, mask, 8);  // of a size known when compiling: no call
  else std::memcpy(&bits, mask, static_cast<size_t>((count + 7) / 8));
  return bits;
}

INLINE void fetch_ahead(const float* values) { __builtin_prefetch(values + AHEAD, 0, 2); }

// The moments of blocks to come: these few lie too close for the processor's own prefetch to begin.
INLINE void fetch_moments(const float* moments, int k) {
  for (int i = 0; i < k; i += 16) __builtin_prefetch(moments + i + BLOCK, 0, 2);
}

// Portable: walk over the set bits.
INLINE int gather_bits(const float* w, const float* g, const uint8_t* mask, int64_t n, float* ws, float* gs) {
  int k = 0;
  for (int64_t base = 0; base < n; base += 64) {
    int64_t count = n - base < 64 ? n - base : 64;
    uint64_t bits = bits_of(mask + base / 8, count);
    for (int line = 0; line < 64; line += 16) fetch_ahead(w + base + line);
    while (bits) {
      int64_t i = base + __builtin_ctzll(bits);
      ws[k] = w[i];
      gs[k++] = g[i];
      bits &= bits - 1;
    }
  }
  return k;
}

INLINE void scatter_bits(float* w, const float* g, const uint8_t* mask, int64_t n, const float* ws) {
  int k = 0;
  for (int64_t base = 0; base < n; base += 64) {
    const int64_t count = n - base < 64 ? n - base : 64;
    uint64_t bits = bits_of(mask + base / 8, count);
    for (int line = 0; line < 64; line += 16) fetch_ahead(g + base + line);
    if (count == 64) std::memset(w + base, 0, 64 * sizeof(float));
    else std::memset(w + base, 0, static_cast<size_t>(count) * sizeof(float));
    for (; bits; bits &= bits - 1) w[base + __builtin_ctzll(bits)] = ws[k++];
  }
}

#if defined(__x86_64__)
#define TARGET_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma,popcnt,bmi,bmi2,prefer-vector-width=512")))
#define TARGET_AVX2 __attribute__((target("avx2,fma,popcnt,bmi,bmi2")))

// In registers: compress and expand to and from memory are microcoded on some processors. Stored by halves, the upper
// one where it holds anything: whole vectors, each over a part of the one before, cost Zen 4 a third more (at 70 and 90 %
// 4.7 and 4.9 for 3.5 and 3.7 ns a vector, from its second cache).
TARGET_AVX512 inline int gather_avx512(const float* w, const float* g, const uint8_t* mask, int64_t n, float* ws,
                                       float* gs) {
  int k = 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    uint16_t bits;
    std::memcpy(&bits, mask + i / 8, 2);
    fetch_ahead(w + i);
    const __m512 weights = _mm512_maskz_compress_ps(bits, _mm512_loadu_ps(w + i));
    const __m512 gradients = _mm512_maskz_compress_ps(bits, _mm512_loadu_ps(g + i));
    const int count = __builtin_popcount(bits);
    _mm256_storeu_ps(ws + k, _mm512_castps512_ps256(weights));
    _mm256_storeu_ps(gs + k, _mm512_castps512_ps256(gradients));
    if (count > 8) {
      _mm256_storeu_ps(ws + k + 8, _mm512_extractf32x8_ps(weights, 1));
      _mm256_storeu_ps(gs + k + 8, _mm512_extractf32x8_ps(gradients, 1));
    }
    k += count;
  }
  if (i < n) {
    uint16_t bits = static_cast<uint16_t>(bits_of(mask + i / 8, n - i));
    __mmask16 inside = static_cast<__mmask16>((1u << (n - i)) - 1);
    _mm512_storeu_ps(ws + k, _mm512_maskz_compress_ps(bits, _mm512_maskz_loadu_ps(inside, w + i)));
    _mm512_storeu_ps(gs + k, _mm512_maskz_compress_ps(bits, _mm512_maskz_loadu_ps(inside, g + i)));
    k += __builtin_popcount(bits);
  }
  return k;
}

TARGET_AVX512 inline void scatter_avx512(float* w, const float* g, const uint8_t* mask, int64_t n, const float* ws) {
  int k = 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    uint16_t bits;
    std::memcpy(&bits, mask + i / 8, 2);
    fetch_ahead(g + i);
    _mm512_storeu_ps(w + i, _mm512_maskz_expand_ps(bits, _mm512_loadu_ps(ws + k)));
    k += __builtin_popcount(bits);
  }
  if (i < n) {
    const uint16_t bits = static_cast<uint16_t>(bits_of(mask + i / 8, n - i));
    const __mmask16 inside = static_cast<__mmask16>((1u << (n - i)) - 1);
    _mm512_mask_storeu_ps(w + i, inside, _mm512_maskz_expand_ps(bits, _mm512_loadu_ps(ws + k)));
  }
}

// Of a byte: the lanes of its set bits, first to the front; for each lane the set bits before it; the bits as lanes.
struct Lanes {
  alignas(32) int32_t index[256][8], before[256][8], alive[256][8];
  Lanes() {
    for (int byte = 0; byte < 256; ++byte) {
      int k = 0;
      for (int lane = 0; lane < 8; ++lane) {
        const int bit = byte >> lane & 1;
        before[byte][lane] = k;
        alive[byte][lane] = -bit;
        if (bit) index[byte][k++] = lane;
      }
      while (k < 8) index[byte][k++] = 0;
    }
  }
};
const Lanes LANES;

TARGET_AVX2 inline int gather_avx2(const float* w, const float* g, const uint8_t* mask, int64_t n, float* ws, float* gs) {
  int k = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint8_t bits = mask[i / 8];
    fetch_ahead(w + i);
    __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(LANES.index[bits]));
    _mm256_storeu_ps(ws + k, _mm256_permutevar8x32_ps(_mm256_loadu_ps(w + i), lanes));
    _mm256_storeu_ps(gs + k, _mm256_permutevar8x32_ps(_mm256_loadu_ps(g + i), lanes));
    k += __builtin_popcount(bits);
  }
  return k + gather_bits(w + i, g + i, mask + i / 8, n - i, ws + k, gs + k);
}

TARGET_AVX2 inline void scatter_avx2(float* w, const float* g, const uint8_t* mask, int64_t n, const float* ws) {
  int k = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const uint8_t bits = mask[i / 8];
    fetch_ahead(g + i);
    const __m256i before = _mm256_load_si256(reinterpret_cast<const __m256i*>(LANES.before[bits]));
    const __m256i alive = _mm256_load_si256(reinterpret_cast<const __m256i*>(LANES.alive[bits]));
    const __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(ws + k), before);
    _mm256_storeu_ps(w + i, _mm256_and_ps(spread, _mm256_castsi256_ps(alive)));
    k += __builtin_popcount(bits);
  }
  scatter_bits(w + i, g + i, mask + i / 8, n - i, ws + k);
}
#endif

#if defined(__x86_64__)
TARGET_AVX512 inline void round_avx512(uint16_t* to, const float* from, int64_t n, uint32_t seed) {
  round_bfloat16(to, from, n, seed);
}

TARGET_AVX2 inline void round_avx2(uint16_t* to, const float* from, int64_t n, uint32_t seed) {
  round_bfloat16(to, from, n, seed);
}
#endif

// Below this many blocks a second thread costs more than it saves.
constexpr int64_t SERIAL_BELOW = 64;
// Shares of the blocks for each thread, taken as threads come free: with one each the slower core decided.
constexpr int SHARES = 16;

// Adam's rule inlined once with and once without AMSGrad's third moment.
INLINE void adam_on(const Adam& a, int k, float* w, const float* g, float* m, float* v, float* vmax) {
  if (vmax) adam_rule(a, k, w, g, m, v, vmax);
  else adam_rule(a, k, w, g, m, v, nullptr);
}

template <class T>
INLINE T* address(const int64_t* row, int column) {
  return reinterpret_cast<T*>(row[column]);
}

// The bits of the block that begins at `start`, null where all of it survives, and where its moments begin.
INLINE const uint8_t* mask_of(const int64_t* row, int64_t start) {
  return row[MASK] ? address<uint8_t>(row, MASK) + start / 8 : nullptr;
}

INLINE int64_t moments_at(const int64_t* row, int64_t start) {
  return row[OFFSETS] ? address<int32_t>(row, OFFSETS)[start / BLOCK] : start;
}

// Where the chances begin by which the weights from `start` on are rounded: half the numbers away from a moment's.
INLINE uint32_t weight_seed(const int64_t* row, int64_t start) {
  return static_cast<uint32_t>(row[SEED]) * 0x9E3779B9u + 0x80000000u + static_cast<uint32_t>(row[FIRST] + start);
}

// `update(row, start, count, weights, gradients)` on one block, as floats.
template <class Update>
void on_block(int isa, int weight_bytes, const int64_t* row, int64_t start, int64_t count, const Update& update) {
  if (weight_bytes == 4)
    return update(row, start, count, address<float>(row, WEIGHT) + start, address<float>(row, GRAD) + start);
  alignas(64) float w[BLOCK], g[BLOCK];
  uint16_t* weights = address<uint16_t>(row, WEIGHT) + start;
  widen_bfloat16(w, weights, count);
  widen_bfloat16(g, address<uint16_t>(row, GRAD) + start, count);
  update(row, start, count, w, g);
  const uint32_t seed = weight_seed(row, start);
#if defined(__x86_64__)
  if (isa == AVX512) return round_avx512(weights, w, count, seed);
  if (isa == AVX2) return round_avx2(weights, w, count, seed);
#endif
  round_bfloat16(weights, w, count, seed);
}

// Runs `update` as above on every block of every tensor, by contiguous shares of the blocks.
template <class Update>
void for_all_blocks(int isa, int threads, int64_t tensors, const int64_t* table, int weight_bytes,
                    const Update& update) {
  int64_t total = 0;
  for (int64_t t = 0; t < tensors; ++t) total += (table[t * ROW] + BLOCK - 1) / BLOCK;
  if (total < SERIAL_BELOW) threads = 1;
  const int shares = threads > 1 ? threads * SHARES : 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int share = 0; share < shares; ++share) {
    int64_t at = 0;
    const int64_t first = total * share / shares, last = total * (share + 1) / shares;
    for (int64_t t = 0; t < tensors && at < last; ++t) {
      const int64_t* row = table + t * ROW;
      const int64_t blocks = (row[0] + BLOCK - 1) / BLOCK;
      const int64_t from = first > at ? first - at : 0, to = last - at < blocks ? last - at : blocks;
      for (int64_t b = from; b < to; ++b) {
        const int64_t start = b * BLOCK;
        on_block(isa, weight_bytes, row, start, row[0] - start < BLOCK ? row[0] - start : BLOCK, update);
      }
      at += blocks;
    }
  }
}

}  // namespace
