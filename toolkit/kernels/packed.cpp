// Updates on CPU with float32 moments: one step for the survivors of pruned tensors, or for dense ones. See packed.h.

#include "packed.h"

namespace {

#if defined(__x86_64__)
TARGET_AVX512 void adam_block_avx512(const Adam& a, float* w, float* g, const uint8_t* mask, int64_t n, float* m,
                                     float* v, float* vmax) {
  if (!mask) return adam_on(a, static_cast<int>(n), w, g, m, v, vmax);
  alignas(64) float ws[BLOCK + 16], gs[BLOCK + 16];
  const int k = gather_avx512(w, g, mask, n, ws, gs);
  fetch_moments(m, k);
  fetch_moments(v, k);
  adam_on(a, k, ws, gs, m, v, vmax);
  scatter_avx512(w, g, mask, n, ws);
}

TARGET_AVX2 void adam_block_avx2(const Adam& a, float* w, float* g, const uint8_t* mask, int64_t n, float* m,
                                 float* v, float* vmax) {
  if (!mask) return adam_on(a, static_cast<int>(n), w, g, m, v, vmax);
  alignas(64) float ws[BLOCK + 16], gs[BLOCK + 16];
  const int k = gather_avx2(w, g, mask, n, ws, gs);
  fetch_moments(m, k);
  fetch_moments(v, k);
  adam_on(a, k, ws, gs, m, v, vmax);
  scatter_avx2(w, g, mask, n, ws);
}

TARGET_AVX512 void sgd_block_avx512(const Sgd& s, float* w, float* g, const uint8_t* mask, int64_t n, float* m) {
  if (!mask) return sgd_rule(s, static_cast<int>(n), w, g, m);
  alignas(64) float ws[BLOCK + 16], gs[BLOCK + 16];
  const int k = gather_avx512(w, g, mask, n, ws, gs);
  fetch_moments(m, k);
  sgd_rule(s, k, ws, gs, m);
  scatter_avx512(w, g, mask, n, ws);
}

TARGET_AVX2 void sgd_block_avx2(const Sgd& s, float* w, float* g, const uint8_t* mask, int64_t n, float* m) {
  if (!mask) return sgd_rule(s, static_cast<int>(n), w, g, m);
  alignas(64) float ws[BLOCK + 16], gs[BLOCK + 16];
  const int k = gather_avx2(w, g, mask, n, ws, gs);
  fetch_moments(m, k);
  sgd_rule(s, k, ws, gs, m);
  scatter_avx2(w, g, mask, n, ws);
}
#endif

void adam_block(const Adam& a, float* w, float* g, const uint8_t* mask, int64_t n, float* m, float* v,
                float* vmax) {
  if (!mask) return adam_on(a, static_cast<int>(n), w, g, m, v, vmax);
  float ws[BLOCK], gs[BLOCK];
  const int k = gather_bits(w, g, mask, n, ws, gs);
  fetch_moments(m, k);
  fetch_moments(v, k);
  adam_on(a, k, ws, gs, m, v, vmax);
  scatter_bits(w, g, mask, n, ws);
}

void sgd_block(const Sgd& s, float* w, float* g, const uint8_t* mask, int64_t n, float* m) {
  if (!mask) return sgd_rule(s, static_cast<int>(n), w, g, m);
  float ws[BLOCK], gs[BLOCK];
  const int k = gather_bits(w, g, mask, n, ws, gs);
  fetch_moments(m, k);
  sgd_rule(s, k, ws, gs, m);
  scatter_bits(w, g, mask, n, ws);
}

}  // namespace

extern "C" {

// Best code this processor runs: 2 AVX-512, 1 AVX2, 0 portable.
int packed_best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return AVX2;
#endif
  return PORTABLE;
}

// `hyper` is struct Adam as 8 floats; the third moment's address may be 0; `weight_bytes`: 4, or 2 for bfloat16.
void packed_adam(int isa, int threads, int64_t tensors, const int64_t* table, const float* hyper, int weight_bytes) {
  Adam a;
  std::memcpy(&a, hyper, sizeof(a));
  for_all_blocks(isa, threads, tensors, table, weight_bytes,
                 [&](const int64_t* row, int64_t start, int64_t count, float* w, float* g) {
    const uint8_t* mask = mask_of(row, start);
    const int64_t at = moments_at(row, start);
    float *m = address<float>(row, MOMENT) + at, *v = address<float>(row, MOMENT + 1) + at;
    float* vmax = row[MOMENT + 2] ? address<float>(row, MOMENT + 2) + at : nullptr;
#if defined(__x86_64__)
    if (isa == AVX512) return adam_block_avx512(a, w, g, mask, count, m, v, vmax);
    if (isa == AVX2) return adam_block_avx2(a, w, g, mask, count, m, v, vmax);
#endif
    adam_block(a, w, g, mask, count, m, v, vmax);
  });
}

// `hyper` is the five floats of struct Sgd.
void packed_sgd(int isa, int threads, int64_t tensors, const int64_t* table, const float* hyper, int nesterov,
                int first, int weight_bytes) {
  Sgd s;
  std::memcpy(&s, hyper, 5 * sizeof(float));
  s.nesterov = nesterov;
  s.first = first;
  for_all_blocks(isa, threads, tensors, table, weight_bytes,
                 [&](const int64_t* row, int64_t start, int64_t count, float* w, float* g) {
    const uint8_t* mask = mask_of(row, start);
    float* m = address<float>(row, MOMENT) + moments_at(row, start);
#if defined(__x86_64__)
    if (isa == AVX512) return sgd_block_avx512(s, w, g, mask, count, m);
    if (isa == AVX2) return sgd_block_avx2(s, w, g, mask, count, m);
#endif
    sgd_block(s, w, g, mask, count, m);
  });
}
}
