// The groups of narrow.cpp on AVX-512: the same codes, with fewer ways through memory.
//
// 32 weights at a time stay in registers from codes to update; what goes through memory is the upper half of each new
// moment, a vector for 32 of them, until the group's largest is known. Codes are written when the block's last group is
// updated: a load that touches what a masked store spans, the next group's, waits for it (at 90 % 5.5 for 4.6 ns a
// vector from Zen 4's second cache).
#pragma once

#include "packed.h"

#if defined(__x86_64__)
namespace {

constexpr int HALF_STEP = 8;  // of a signed code, in the upper half of a float

// Upper halves of a moment of a group, to become codes.
struct Halves {
  void* codes;
  int k, exponent;
  alignas(64) uint16_t values[GROUP];
};

// The first `count` of 32 or 64, all where there are more.
TARGET_AVX512 INLINE __mmask32 first_of_32(int count) { return _bzhi_u32(~0u, count < 32 ? count : 32); }
TARGET_AVX512 INLINE __mmask64 first_of_64(int count) { return _bzhi_u64(~0ull, count < 64 ? count : 64); }

TARGET_AVX512 INLINE __m512i hash_avx512(__m512i x) {
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(0x7FEB352D));
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), _mm512_set1_epi32(0x846CA68B));
  return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

// One moment of a group, two vectors at a time. Of 8 bits, those that are not rounded by chance have a sign.
template <class Format>
struct Moment512 {
  using Code = typename Format::Code;

  Code* codes;
  uint8_t* exponent;
  int k;
  Halves& halves;
  __m512i low, chance, most;  // `most`: upper halves of the largest, of signed ones before they are rounded

  TARGET_AVX512 INLINE Moment512(const int64_t* row, int number, const Group& s, Halves& halves)
      : codes(address<Code>(row, MOMENT + number) + s.at),
        exponent(address<uint8_t>(row, EXPONENTS + number) + s.number),
        k(s.k),
        halves(halves),
        low(_mm512_set1_epi16(static_cast<int16_t>(Format::low(Format::SHARED ? *exponent : 0) << 4))),
        most(_mm512_setzero_si512()) {
    const __m512i rank = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (Format::BY_CHANCE) {
      const __m512i begin = _mm512_set1_epi32(Format::begin(seed_of<Format>(row, number, s)));
      chance = _mm512_add_epi32(begin, _mm512_mullo_epi32(rank, _mm512_set1_epi32(Format::STEP)));
    }
  }

  // Halves of floats, in the order that spreading them over two vectors makes whole again.
  TARGET_AVX512 INLINE __m512i read_halves(int i) const {
    if constexpr (Format::SHARED) {
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_maskz_loadu_epi8(first_of_32(k - i), codes + i), order);
      const __m512i code = Format::BY_CHANCE ? _mm512_cvtepu8_epi16(bytes) : _mm512_cvtepi8_epi16(bytes);
      __m512i bits = _mm512_slli_epi16(code, 4);
      if (!Format::BY_CHANCE) bits = _mm512_and_si512(bits, _mm512_set1_epi16(static_cast<int16_t>(0x87FF)));
      return _mm512_mask_add_epi16(bits, _mm512_test_epi16_mask(code, _mm512_set1_epi16(Format::TOP)), bits, low);
    } else {
      const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
      return _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi16(first_of_32(k - i), codes + i));
    }
  }

  TARGET_AVX512 INLINE void read(int i, __m512& x, __m512& y) const {
    const __m512i bits = read_halves(i);
    x = _mm512_castsi512_ps(_mm512_unpacklo_epi16(_mm512_setzero_si512(), bits));
    y = _mm512_castsi512_ps(_mm512_unpackhi_epi16(_mm512_setzero_si512(), bits));
  }

  TARGET_AVX512 INLINE __m512i by_chance(__m512i bits) {
    __m512i rounded;
    if (Format::SHARED) {
      rounded = _mm512_add_epi32(bits, _mm512_srli_epi32(chance, 12));
    } else {
      const __m512i noise = _mm512_and_si512(hash_avx512(chance), _mm512_set1_epi32(0xFFFF));
      const __m512i infinite = _mm512_set1_epi32(0x7F800000);
      const __mmask16 finite = _mm512_cmplt_epu32_mask(_mm512_and_si512(bits, infinite), infinite);
      rounded = _mm512_mask_add_epi32(bits, finite, bits, noise);
    }
    chance = _mm512_add_epi32(chance, _mm512_set1_epi32(16 * Format::STEP));
    return rounded;
  }

  TARGET_AVX512 INLINE void keep(int i, __m512 x, __m512 y) {
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    __m512i one = _mm512_castps_si512(x), other = _mm512_castps_si512(y);
    if (Format::BY_CHANCE) {
      one = by_chance(one);
      other = by_chance(other);
    }
    const __m512i upper = _mm512_permutex2var_epi16(one, odd, other);
    if (Format::SHARED)
      most = _mm512_max_epu16(most, Format::BY_CHANCE ? upper : _mm512_and_si512(upper, _mm512_set1_epi16(0x7FFF)));
    _mm512_store_si512(halves.values + i, upper);
  }

  TARGET_AVX512 INLINE int highest() const {
    const __m256i x = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
    const __m128i y = _mm_max_epu16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    return static_cast<uint16_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(~y))) + (Format::BY_CHANCE ? 0 : HALF_STEP);
  }

  TARGET_AVX512 INLINE void end() {
    halves.codes = codes;
    halves.k = k;
    if (Format::SHARED) *exponent = halves.exponent = exponent_of<Format>(highest());
  }
};

// Int8's `narrow`, but for the bound and the sign, which come with packing.
template <bool SIGNED>
TARGET_AVX512 INLINE __m512i above_low(__m512i upper, __m512i low) {
  if (SIGNED) {
    const __m512i absolute = _mm512_and_si512(upper, _mm512_set1_epi16(0x7FFF));
    return _mm512_subs_epu16(_mm512_srli_epi16(_mm512_add_epi16(absolute, _mm512_set1_epi16(HALF_STEP)), 4), low);
  }
  const __m512i size = _mm512_srli_epi16(upper, 4);
  return _mm512_max_epu16(_mm512_subs_epu16(size, low), _mm512_min_epu16(size, _mm512_set1_epi16(1)));
}

template <class Format>
TARGET_AVX512 INLINE void write_codes(const Halves& s) {
  auto* codes = static_cast<typename Format::Code*>(s.codes);
  if constexpr (!Format::SHARED) {
    for (int i = 0; i < s.k; i += 32)
      _mm512_mask_storeu_epi16(codes + i, first_of_32(s.k - i), _mm512_load_si512(s.values + i));
    return;
  }
  constexpr bool SIGNED = !Format::BY_CHANCE;  // of 8 bits
  const __m512i low = _mm512_set1_epi16(Format::low(s.exponent));
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);  // packing takes turns between its operands
  for (int i = 0; i < s.k; i += 64) {
    const __m512i x = _mm512_load_si512(s.values + i), y = _mm512_load_si512(s.values + i + 32);
    const __m512i one = above_low<SIGNED>(x, low), other = above_low<SIGNED>(y, low);
    __m512i bytes = SIGNED ? _mm512_packs_epi16(one, other) : _mm512_packus_epi16(one, other);
    if (SIGNED) {
      const __m512i signs = _mm512_and_si512(_mm512_packs_epi16(x, y), _mm512_set1_epi8(static_cast<int8_t>(0x80)));
      bytes = _mm512_or_si512(bytes, signs);
    }
    _mm512_mask_storeu_epi8(codes + i, first_of_64(s.k - i), _mm512_permutexvar_epi64(order, bytes));
  }
}

// Of the moments of a group: the first one has signs.
template <template <bool> class Format>
TARGET_AVX512 INLINE void write_codes(const Halves* moments, int count) {
  write_codes<Format<true>>(moments[0]);
  for (int i = 1; i < count; ++i) write_codes<Format<false>>(moments[i]);
}

// With the processor's root and division, which run beside all else that a coded moment needs: from the second cache of
// Zen 4 7.1 ns a vector, with its guess of a root and a step of Newton 8.0, with a guess of the quotient too 8.5.
TARGET_AVX512 INLINE void adam_vector(const Adam& a, float* w, const float* g, __m512& m, __m512& v, __m512* vmax) {
  const __m512 before = _mm512_loadu_ps(w);
  adam_moments(a, before, _mm512_loadu_ps(g), m, v, vmax);
  const __m512 update = m / (_mm512_sqrt_ps(vmax ? *vmax : v) * a.inv_bias2_sqrt + a.eps);
  _mm512_storeu_ps(w, before * a.decay - a.step_size * update);
}

template <template <bool> class Format, bool AMSGRAD>
TARGET_AVX512 INLINE void adam_group_avx512(const Adam& rule, const int64_t* row, const Group& s, Halves* halves) {
  const Adam a = rule;  // which no store to a weight changes
  Moment512<Format<true>> first(row, 0, s, halves[0]);
  Moment512<Format<false>> second(row, 1, s, halves[1]), third(row, AMSGRAD ? 2 : 1, s, halves[2]);
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

template <template <bool> class Format>
TARGET_AVX512 INLINE void adam_group_avx512(const Adam& a, const int64_t* row, const Group& s, Halves* halves) {
  if (row[MOMENT + 2]) adam_group_avx512<Format, true>(a, row, s, halves);
  else adam_group_avx512<Format, false>(a, row, s, halves);
}

template <template <bool> class Format>
TARGET_AVX512 INLINE void sgd_group_avx512(const Sgd& rule, const int64_t* row, const Group& s, Halves* halves) {
  const Sgd r = rule;
  Moment512<Format<true>> buffer(row, 0, s, halves[0]);
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
