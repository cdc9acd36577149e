// Updates on CPU with moments of 8 or 16 bits, of dense tensors and of survivors alike (a tensor without mask is dense).
//
// 256 weights at a time: their survivors' weights, gradients and positions are gathered, moments widened to float32,
// updated by the rules of packed.h, and narrowed again. What the formats are says toolkit.kernels.narrow, whose torch
// code this equals; all of it is integer work on the floats' bits, without a root or a division.

#include "packed.h"

namespace {

constexpr int GROUP = 256;  // weights that share an exponent
constexpr int PAD = 16;     // vectors may work on this much more than there is

// weights, addresses of weight, grad, mask (0: dense), offsets, three moments and their exponents, seed, first position
constexpr int64_t ROW = 13;
constexpr int MOMENT = 5, EXPONENTS = 8, SEED = 11, FIRST = 12;

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

// The formats work on codes as 32-bit numbers: loops that change the width of numbers beside other work vectorize badly.

// 8 bits: 3 of mantissa below an exponent that counts down from the group's. SIGNED: 1 of sign, 4 of exponent, rounded
// to nearest; else 5 of exponent, rounded by chance, and nothing above 0 becomes 0.
template <bool SIGNED>
struct Int8 {
  using Code = uint8_t;
  static constexpr int TOP = SIGNED ? 127 : 255, SHIFT = 20, LOWEST = SIGNED ? 15 : 31;
  static INLINE int base(int exponent) { return (exponent << 3 | 7) - TOP; }

  static INLINE void widen(const int32_t* codes, int exponent, int k, float* x) {
    const int low = base(exponent);
    for (int i = 0; i < k; ++i) {
      const int code = codes[i], size = code & TOP;
      uint32_t bits = static_cast<uint32_t>((size + low) << SHIFT);
      bits = size ? bits : 0u;
      if (SIGNED) bits |= static_cast<uint32_t>(code & 128) << 24;
      x[i] = float_of_bits(bits);
    }
  }

  static INLINE int narrow(const float* x, uint32_t seed, int k, int32_t* codes, bool by_chance = !SIGNED) {
    int highest = 0;
    for (int i = 0; i < k; ++i) {
      const int size = static_cast<int>(bits_of_float(x[i]) & 0x7FFFFFFFu);
      highest = size > highest ? size : highest;
    }
    const int exponent = highest >> 23 > LOWEST ? highest >> 23 : LOWEST, low = base(exponent);
    for (int i = 0; i < k; ++i) {
      const uint32_t bits = bits_of_float(x[i]), size = bits & 0x7FFFFFFFu;
      const uint32_t noise = by_chance ? hash(seed + static_cast<uint32_t>(i)) >> (32 - SHIFT) : 1u << (SHIFT - 1);
      const int least = SIGNED || size == 0 ? 0 : 1;
      int code = static_cast<int>((size + noise) >> SHIFT) - low;
      code = code < least ? least : code;
      code = code > TOP ? TOP : code;
      codes[i] = SIGNED ? code | static_cast<int>(bits >> 24 & 128u) : code;
    }
    return exponent;
  }
};

template <bool SIGNED>
struct Bfloat16 {  // rounded by chance
  using Code = uint16_t;
  static INLINE void widen(const int32_t* codes, int, int k, float* x) {
    for (int i = 0; i < k; ++i) x[i] = float_of_bits(static_cast<uint32_t>(codes[i]) << 16);
  }
  static INLINE int narrow(const float* x, uint32_t seed, int k, int32_t* codes) {
    for (int i = 0; i < k; ++i) {
      const uint32_t bits = bits_of_float(x[i]);
      const uint32_t noise = hash(seed + static_cast<uint32_t>(i)) & 0xFFFFu;
      codes[i] = static_cast<int32_t>((bits + ((bits & 0x7F800000u) == 0x7F800000u ? 0u : noise)) >> 16);
    }
    return 0;
  }
};

// The weights of a group that are updated, and their gradients, side by side.
struct Group {
  float* w;
  const float* g;
  int k;           // of them, and rounded up to whole vectors
  int padded;
  int64_t at;      // where their moments begin
  int64_t number;  // of the group in the tensor
};

// One moment of a group, as it lies in memory.
template <class Format>
struct Moment {
  using Code = typename Format::Code;
  Code* codes;
  uint8_t* exponent;  // null where the format has none
  uint32_t seed;      // of the chances: the i-th value's depends on this and i

  Moment(const int64_t* row, int number, const Group& s)
      : codes(row[MOMENT + number] ? reinterpret_cast<Code*>(row[MOMENT + number]) + s.at : nullptr),
        exponent(row[EXPONENTS + number] ? reinterpret_cast<uint8_t*>(row[EXPONENTS + number]) + s.number : nullptr),
        seed(static_cast<uint32_t>(row[SEED] + number) * 0x9E3779B9u +
             static_cast<uint32_t>(exponent ? row[FIRST] + s.number * GROUP : s.at)) {}

  // Through a copy: vectors reach beyond the group's end, where other groups' codes lie.
  INLINE void widen(const Group& s, float* x) const {
    alignas(64) Code own[GROUP + PAD];
    alignas(64) int32_t wide[GROUP + PAD];
    std::memcpy(own, codes, static_cast<size_t>(s.k) * sizeof(Code));
    std::memset(own + s.k, 0, PAD * sizeof(Code));
    for (int i = 0; i < s.padded; ++i) wide[i] = own[i];
    Format::widen(wide, exponent ? *exponent : 0, s.padded, x);
  }

  INLINE void narrow(const Group& s, const float* x) const {
    alignas(64) Code own[GROUP + PAD];
    alignas(64) int32_t wide[GROUP + PAD];
    const int found = Format::narrow(x, seed, s.padded, wide);
    if (exponent) *exponent = static_cast<uint8_t>(found);
    for (int i = 0; i < s.padded; ++i) own[i] = static_cast<Code>(wide[i]);
    std::memcpy(codes, own, static_cast<size_t>(s.k) * sizeof(Code));
  }
};

template <template <bool> class Format>
INLINE void adam_group(const Adam& a, const int64_t* row, const Group& s) {
  alignas(64) float m[GROUP + PAD], v[GROUP + PAD], vmax[GROUP + PAD];
  const Moment<Format<true>> first(row, 0, s);
  const Moment<Format<false>> second(row, 1, s), highest(row, 2, s);
  first.widen(s, m);
  second.widen(s, v);
  if (highest.codes) highest.widen(s, vmax);
  adam_on(a, s.padded, s.w, const_cast<float*>(s.g), m, v, highest.codes ? vmax : nullptr);
  first.narrow(s, m);
  second.narrow(s, v);
  if (highest.codes) highest.narrow(s, vmax);
}

template <template <bool> class Format>
INLINE void sgd_group(const Sgd& r, const int64_t* row, const Group& s) {
  alignas(64) float m[GROUP + PAD];
  const Moment<Format<true>> buffer(row, 0, s);
  buffer.widen(s, m);
  sgd_rule(r, s.padded, s.w, const_cast<float*>(s.g), m);
  buffer.narrow(s, m);
}

// Work on the groups of a block: GATHER and SCATTER are those of an instruction set, UPDATE takes the group `s`.
#define FOR_GROUPS(GATHER, SCATTER, UPDATE)                                                         \
  alignas(64) float ws[GROUP + PAD], gs[GROUP + PAD];                                               \
  int64_t at = row[4] ? address<int32_t>(row, 4)[start / BLOCK] : start;                            \
  for (int64_t begin = start; begin < start + count; begin += GROUP) {                              \
    const int n = static_cast<int>(start + count - begin < GROUP ? start + count - begin : GROUP);  \
    float* w = address<float>(row, 1) + begin;                                                      \
    float* g = address<float>(row, 2) + begin;                                                      \
    const uint8_t* mask = row[3] ? address<uint8_t>(row, 3) + begin / 8 : nullptr;                  \
    Group s{w, g, n, n, at, begin / GROUP};                                                         \
    const bool copied = mask || n < GROUP;                                                          \
    if (copied) {                                                                                   \
      if (mask) s.k = GATHER(w, g, mask, n, ws, gs);                                                \
      else copy(w, g, n, ws, gs);                                                                   \
      s.w = ws, s.g = gs, s.padded = (s.k + PAD - 1) / PAD * PAD;                                   \
      for (int i = s.k; i < s.padded; ++i) ws[i] = gs[i] = 0.0f;                                    \
    }                                                                                               \
    UPDATE;                                                                                         \
    if (mask) SCATTER(w, mask, n, ws);                                                              \
    else if (copied) std::memcpy(w, ws, static_cast<size_t>(n) * sizeof(float));                    \
    at += s.k;                                                                                      \
  }

INLINE void copy(const float* w, const float* g, int n, float* ws, float* gs) {
  std::memcpy(ws, w, static_cast<size_t>(n) * sizeof(float));
  std::memcpy(gs, g, static_cast<size_t>(n) * sizeof(float));
}

#if defined(__x86_64__)
template <template <bool> class Format>
TARGET_AVX512 void adam_block_avx512(const Adam& a, const int64_t* row, int64_t start, int64_t count) {
  FOR_GROUPS(gather_avx512, scatter_avx512, adam_group<Format>(a, row, s))
}

template <template <bool> class Format>
TARGET_AVX2 void adam_block_avx2(const Adam& a, const int64_t* row, int64_t start, int64_t count) {
  FOR_GROUPS(gather_avx2, scatter_avx2, adam_group<Format>(a, row, s))
}

template <template <bool> class Format>
TARGET_AVX512 void sgd_block_avx512(const Sgd& r, const int64_t* row, int64_t start, int64_t count) {
  FOR_GROUPS(gather_avx512, scatter_avx512, sgd_group<Format>(r, row, s))
}

template <template <bool> class Format>
TARGET_AVX2 void sgd_block_avx2(const Sgd& r, const int64_t* row, int64_t start, int64_t count) {
  FOR_GROUPS(gather_avx2, scatter_avx2, sgd_group<Format>(r, row, s))
}
#endif

template <template <bool> class Format>
void adam_block(const Adam& a, const int64_t* row, int64_t start, int64_t count) {
  FOR_GROUPS(gather_bits, scatter_bits, adam_group<Format>(a, row, s))
}

template <template <bool> class Format>
void sgd_block(const Sgd& r, const int64_t* row, int64_t start, int64_t count) {
  FOR_GROUPS(gather_bits, scatter_bits, sgd_group<Format>(r, row, s))
}

template <template <bool> class Format>
void adam_all(int isa, int threads, int64_t tensors, const int64_t* table, const Adam& a) {
  for_all_blocks<ROW>(threads, tensors, table, [&](const int64_t* row, int64_t start, int64_t count) {
#if defined(__x86_64__)
    if (isa == AVX512) return adam_block_avx512<Format>(a, row, start, count);
    if (isa == AVX2) return adam_block_avx2<Format>(a, row, start, count);
#endif
    adam_block<Format>(a, row, start, count);
  });
}

template <template <bool> class Format>
void sgd_all(int isa, int threads, int64_t tensors, const int64_t* table, const Sgd& r) {
  for_all_blocks<ROW>(threads, tensors, table, [&](const int64_t* row, int64_t start, int64_t count) {
#if defined(__x86_64__)
    if (isa == AVX512) return sgd_block_avx512<Format>(r, row, start, count);
    if (isa == AVX2) return sgd_block_avx2<Format>(r, row, start, count);
#endif
    sgd_block<Format>(r, row, start, count);
  });
}

}  // namespace

extern "C" {

// `hyper` as in packed.cpp; `bytes` of a moment: 1 or 2.
void narrow_adam(int isa, int threads, int64_t tensors, const int64_t* table, const float* hyper, int bytes) {
  Adam a;
  std::memcpy(&a, hyper, sizeof(a));
  if (bytes == 1) adam_all<Int8>(isa, threads, tensors, table, a);
  else adam_all<Bfloat16>(isa, threads, tensors, table, a);
}

void narrow_sgd(int isa, int threads, int64_t tensors, const int64_t* table, const float* hyper, int nesterov,
                int first, int bytes) {
  Sgd r;
  std::memcpy(&r, hyper, 5 * sizeof(float));
  r.nesterov = nesterov;
  r.first = first;
  if (bytes == 1) sgd_all<Int8>(isa, threads, tensors, table, r);
  else sgd_all<Bfloat16>(isa, threads, tensors, table, r);
}

// Kept values of the group of up to 256 weights that begins at `begin` of `n`.
static int num_kept(int64_t n, const uint8_t* mask, int64_t begin) {
  const int count = static_cast<int>(n - begin < GROUP ? n - begin : GROUP);
  if (!mask) return count;
  int k = 0;
  for (int base = 0; base < count; base += 64) {
    const int left = count - base;
    const uint64_t bits = bits_of(mask + (begin + base) / 8, left < 64 ? left : 64);
    k += __builtin_popcountll(left < 64 ? bits & ((uint64_t{1} << left) - 1) : bits);
  }
  return k;
}

// The 8-bit codes of `n` weights, which begin where a group does, as floats; without a mask all are kept.
void narrow_widen(int64_t n, const uint8_t* mask, const uint8_t* codes, const uint8_t* exponents, int is_signed,
                  float* out) {
  alignas(64) int32_t wide[GROUP];
  for (int64_t begin = 0; begin < n; begin += GROUP) {
    const int k = num_kept(n, mask, begin);
    for (int i = 0; i < k; ++i) wide[i] = codes[i];
    if (is_signed) Int8<true>::widen(wide, *exponents, k, out);
    else Int8<false>::widen(wide, *exponents, k, out);
    codes += k, out += k, ++exponents;
  }
}

// And back, to nearest.
void narrow_to_nearest(int64_t n, const uint8_t* mask, const float* values, int is_signed, uint8_t* codes,
                       uint8_t* exponents) {
  alignas(64) int32_t wide[GROUP];
  for (int64_t begin = 0; begin < n; begin += GROUP) {
    const int k = num_kept(n, mask, begin);
    *exponents++ = static_cast<uint8_t>(is_signed ? Int8<true>::narrow(values, 0, k, wide, false)
                                                  : Int8<false>::narrow(values, 0, k, wide, false));
    for (int i = 0; i < k; ++i) codes[i] = static_cast<uint8_t>(wide[i]);
    codes += k, values += k;
  }
}
}
