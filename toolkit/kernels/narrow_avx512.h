// The groups of narrow.cpp for moments of 8 bits on AVX-512: the same codes, with fewer ways through memory.
//
// 32 weights at a time stay in registers from codes to update; what goes through memory is the upper half of each new
// moment, a vector for 32 of them, until the group's largest is known. Codes are written when the block's last group is
// updated: a load that touches what a masked store spans, the next group's, waits for it (5.5 for 4.6 ns a vector at 90 %).
#pragma once

#include "packed.h"

#if defined(__x86_64__)
namespace {

// Upper halves of a moment of a group, to become codes.
struct Halves {
  uint8_t* codes;
  int k, exponent;
  alignas(64) uint16_t values[GROUP];
};

// The first `count` of a vector's bytes, all where there are more.
TARGET_AVX512 INLINE __mmask32 first_of_32(int count) { return _bzhi_u32(~0u, count < 32 ? count : 32); }
TARGET_AVX512 INLINE __mmask64 first_of_64(int count) { return _bzhi_u64(~0ull, count < 64 ? count : 64); }

// One moment of a group, two vectors at a time.
template <bool SIGNED>
struct Moment512 {
  using Format = Int8<SIGNED>;

  uint8_t *codes, *exponent;
  int k;
  Halves& halves;
  __m512i low, chance, most;  // `most`: the largest floats' bits, SIGNED: their upper halves

  TARGET_AVX512 INLINE Moment512(const int64_t* row, int number, const Group& s, Halves& halves)
      : codes(address<uint8_t>(row, MOMENT + number) + s.at),
        exponent(address<uint8_t>(row, EXPONENTS + number) + s.number),
        k(s.k),
        halves(halves),
        low(_mm512_set1_epi32(Format::low(*exponent) << 20)),
        most(_mm512_setzero_si512()) {
    const __m512i rank = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (!SIGNED) {
      const __m512i begin = _mm512_set1_epi32(Format::begin(seed_of<Format>(row, number, s)));
      chance = _mm512_add_epi32(begin, _mm512_mullo_epi32(rank, _mm512_set1_epi32(Format::STEP)));
    }
  }

  TARGET_AVX512 INLINE __m512 widen(__m128i bytes) const {
    const __m512i code = SIGNED ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
    __m512i bits = _mm512_slli_epi32(code, 20);
    if (SIGNED) bits = _mm512_and_si512(bits, _mm512_set1_epi32(0x87FFFFFF));  // copies of the sign, but for one
    const __mmask16 some = _mm512_test_epi32_mask(code, _mm512_set1_epi32(Format::TOP));
    return _mm512_castsi512_ps(_mm512_mask_add_epi32(bits, some, bits, low));
  }

  TARGET_AVX512 INLINE void read(int i, __m512& x, __m512& y) const {
    const __m256i bytes = _mm256_maskz_loadu_epi8(first_of_32(k - i), codes + i);
    x = widen(_mm256_castsi256_si128(bytes));
    y = widen(_mm256_extracti128_si256(bytes, 1));
  }

  TARGET_AVX512 INLINE __m512i by_chance(__m512i bits) {
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_srli_epi32(chance, 12));
    chance = _mm512_add_epi32(chance, _mm512_set1_epi32(16 * Format::STEP));
    return rounded;
  }

  TARGET_AVX512 INLINE void keep(int i, __m512 x, __m512 y) {
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    __m512i one = _mm512_castps_si512(x), other = _mm512_castps_si512(y);
    if (!SIGNED) {
      most = _mm512_max_epu32(most, _mm512_max_epu32(one, other));
      one = by_chance(one);
      other = by_chance(other);
    }
    const __m512i upper = _mm512_permutex2var_epi16(one, odd, other);
    if (SIGNED) most = _mm512_max_epu16(most, _mm512_and_si512(upper, _mm512_set1_epi16(0x7FFF)));
    _mm512_store_si512(halves.values + i, upper);
  }

  TARGET_AVX512 INLINE int highest() const {
    if (!SIGNED) return _mm512_reduce_max_epu32(most) >> 23 & 255;
    const __m256i x = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
    const __m128i y = _mm_max_epu16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    return static_cast<uint16_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(~y))) >> 7;
  }

  TARGET_AVX512 INLINE void end() {
    halves.codes = codes;
    halves.k = k;
    *exponent = halves.exponent = larger(highest(), Format::LOWEST);
  }
};

// Int8's `narrow`; to nearest, half a step of the code is bit 3 of the upper half.
template <bool SIGNED>
TARGET_AVX512 INLINE __m512i narrow_32(const uint16_t* values, __m512i low) {
  const __m512i upper = _mm512_load_si512(values);
  if (!SIGNED) {
    const __m512i size = _mm512_srli_epi16(upper, 4);
    return _mm512_max_epu16(_mm512_subs_epu16(size, low), _mm512_min_epu16(size, _mm512_set1_epi16(1)));
  }
  const __m512i absolute = _mm512_and_si512(upper, _mm512_set1_epi16(0x7FFF));
  const __m512i size = _mm512_srli_epi16(_mm512_add_epi16(absolute, _mm512_set1_epi16(8)), 4);
  const __m512i code = _mm512_min_epu16(_mm512_subs_epu16(size, low), _mm512_set1_epi16(Int8<SIGNED>::TOP));
  return _mm512_or_si512(code, _mm512_and_si512(_mm512_srli_epi16(upper, 8), _mm512_set1_epi16(128)));
}

template <bool SIGNED>
TARGET_AVX512 INLINE void write_codes(const Halves& s) {
  const __m512i low = _mm512_set1_epi16(Int8<SIGNED>::low(s.exponent));
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);  // packing takes turns between its operands
  for (int i = 0; i < s.k; i += 64) {
    const __m512i bytes =
        _mm512_packus_epi16(narrow_32<SIGNED>(s.values + i, low), narrow_32<SIGNED>(s.values + i + 32, low));
    _mm512_mask_storeu_epi8(s.codes + i, first_of_64(s.k - i), _mm512_permutexvar_epi64(order, bytes));
  }
}

// Of the moments of a group: the first one has signs.
TARGET_AVX512 INLINE void write_codes(const Halves* moments, int count) {
  write_codes<true>(moments[0]);
  for (int i = 1; i < count; ++i) write_codes<false>(moments[i]);
}

// With the processor's root and division, which run beside all else that a coded moment needs: from the second cache of
// Zen 4 7.9 ns a vector, 8.8 with its guess of a root and a step of Newton, 9.3 with a guess of the quotient too.
TARGET_AVX512 INLINE void adam_vector(const Adam& a, float* w, const float* g, __m512& m, __m512& v, __m512* vmax) {
  const __m512 before = _mm512_loadu_ps(w);
  adam_moments(a, before, _mm512_loadu_ps(g), m, v, vmax);
  const __m512 update = m / (_mm512_sqrt_ps(vmax ? *vmax : v) * a.inv_bias2_sqrt + a.eps);
  _mm512_storeu_ps(w, before * a.decay - a.step_size * update);
}

template <bool AMSGRAD>
TARGET_AVX512 INLINE void adam_group_avx512(const Adam& rule, const int64_t* row, const Group& s, Halves* halves) {
  const Adam a = rule;  // which no store to a weight changes
  Moment512<true> first(row, 0, s, halves[0]);
  Moment512<false> second(row, 1, s, halves[1]), third(row, AMSGRAD ? 2 : 1, s, halves[2]);
  for (int i = 0; i < s.k; i += 32) {
    __m512 m[2], v[2], vmax[2];
    first.read(i, m[0], m[1]);
    second.read(i, v[0], v[1]);
    if (AMSGRAD) third.read(i, vmax[0], vmax[1]);
    adam_vector(a, s.w + i, s.g + i, m[0], v[0], AMSGRAD ? vmax : nullptr);
    adam_vector(a, s.w + i + 16, s.g + i + 16, m[1], v[1], AMSGRAD ? vmax + 1 : nullptr);
    first.keep(i, m[0], m[1]);
    second.keep(i, v[0], v[1]);
    if (AMSGRAD) third.keep(i, vmax[0], vmax[1]);
  }
  first.end();
  second.end();
  if (AMSGRAD) third.end();
}

TARGET_AVX512 INLINE void adam_group_avx512(const Adam& a, const int64_t* row, const Group& s, Halves* halves) {
  if (row[MOMENT + 2]) adam_group_avx512<true>(a, row, s, halves);
  else adam_group_avx512<false>(a, row, s, halves);
}

TARGET_AVX512 INLINE void sgd_group_avx512(const Sgd& rule, const int64_t* row, const Group& s, Halves* halves) {
  const Sgd r = rule;
  Moment512<true> buffer(row, 0, s, halves[0]);
  for (int i = 0; i < s.k; i += 32) {
    __m512 m[2];
    buffer.read(i, m[0], m[1]);
    for (int half = 0; half < 2; ++half) {
      float* w = s.w + i + 16 * half;
      _mm512_storeu_ps(w, sgd_value(r, _mm512_loadu_ps(w), _mm512_loadu_ps(s.g + i + 16 * half), m[half]));
    }
    buffer.keep(i, m[0], m[1]);
  }
  buffer.end();
}

}  // namespace
#endif
