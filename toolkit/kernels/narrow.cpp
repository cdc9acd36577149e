// Updates on CPU with moments of 8 or 16 bits, of dense tensors and of survivors alike (a tensor without mask is dense).
//
// A block of 1,024 weights at a time: survivors are gathered; then 256 weights at a time moments are widened to float32,
// updated by the rules of packed.h, and narrowed again. What the formats are says toolkit.kernels.narrow, whose torch
// code this equals; all of it is integer work on the floats' bits. narrow_avx512.h does the same in AVX-512's own words.

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to nobody: everything is inlined

#include "packed.h"

namespace {

constexpr int GROUP = 256;  // weights that share an exponent
constexpr int CHUNK = 64;   // values that loops over 8 and 16 bits take at a time, whatever is behind the last one
constexpr int PAD = 32;     // zeros behind a group's weights: an update takes no more at a time

// LANES values at a time, as vectors of GCC and clang: each instruction set has the same code in its own instructions.
template <int LANES>
struct Vectors {
  typedef float Floats __attribute__((vector_size(4 * LANES)));
};

template <class Vector>
INLINE Vector load(const void* from) {
  Vector x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

template <class Vector>
INLINE void store(void* to, Vector x) {
  std::memcpy(to, &x, sizeof(x));
}

// Of a group; of a known size where it is full: no call.
template <class T>
INLINE void copy(T* to, const T* from, int k) {
  if (k == GROUP) std::memcpy(to, from, GROUP * sizeof(T));
  else std::memcpy(to, from, static_cast<size_t>(k) * sizeof(T));
}

template <class T>
INLINE T larger(T x, T y) {
  return x > y ? x : y;
}

// A group's exponent, of the upper half of its largest as rounded; a GPU's NaN, all bits set, has 256 by then.
template <class Format>
INLINE int exponent_of(int highest) {
  const int exponent = highest >> 7;
  return exponent < Format::LOWEST ? Format::LOWEST : exponent < 255 ? exponent : 255;
}

// A format says how the upper 16 bits of a float become a code, and back: in 16 bits twice as many fit into a vector.
// `low` is what the group's exponent adds to all its codes.

// 8 bits: 3 of mantissa below an exponent that counts down from the group's. SIGNED: 1 of sign, 4 of exponent, rounded
// to nearest; else 5 of exponent, rounded by chance, and nothing above 0 becomes 0.
template <bool SIGNED>
struct Int8 {
  using Code = uint8_t;
  static constexpr bool SHARED = true, BY_CHANCE = !SIGNED;  // SHARED: an exponent
  static constexpr int TOP = SIGNED ? 127 : 255, LOWEST = SIGNED ? 15 : 31;
  static constexpr uint32_t NEAREST = 1u << 19;  // half a step of the code
  static INLINE uint16_t low(int exponent) { return static_cast<uint16_t>((exponent << 3 | 7) - TOP); }

  static INLINE uint16_t widen(uint16_t code, uint16_t low) {
    const uint16_t size = code & TOP, bits = size ? static_cast<uint16_t>(size + low) : uint16_t{0};
    return static_cast<uint16_t>(SIGNED ? bits << 4 | (code & 128) << 8 : bits << 4);
  }

  static INLINE uint16_t narrow(uint16_t upper, uint16_t low) {
    const uint16_t size = static_cast<uint16_t>((SIGNED ? upper & 0x7FFF : upper) >> 4);
    const uint16_t least = SIGNED ? 0 : size < 1 ? size : 1;
    uint16_t code = static_cast<uint16_t>((size > low ? size : low) - low);
    code = code > least ? code : least;
    code = code < TOP ? code : uint16_t{TOP};
    return static_cast<uint16_t>(SIGNED ? code | (upper >> 8 & 128) : code);
  }

  static INLINE uint32_t round(uint32_t bits, uint32_t noise) {  // a NaN of a GPU, all bits set, would become 0
    return SIGNED && (bits & 0x7F800000u) == 0x7F800000u ? bits : bits + noise;
  }

  // By steps of the golden ratio from a start by chance: even over a group, and over the steps of one value.
  static constexpr uint32_t STEP = 0x9E3779B1u;
  static INLINE uint32_t begin(uint32_t seed) { return hash(seed); }
  static INLINE uint32_t noise(uint32_t state) { return state >> 12; }
};

template <bool SIGNED>
struct Bfloat16 {  // rounded by chance; infinity and NaN stay what they are
  using Code = uint16_t;
  static constexpr bool SHARED = false, BY_CHANCE = true;
  static constexpr int LOWEST = 0;
  static constexpr uint32_t NEAREST = 0, STEP = 1;
  static INLINE uint16_t low(int) { return 0; }
  static INLINE uint16_t widen(uint16_t code, uint16_t) { return code; }
  static INLINE uint16_t narrow(uint16_t upper, uint16_t) { return upper; }
  static INLINE uint32_t round(uint32_t bits, uint32_t noise) { return with_noise(bits, noise); }
  static INLINE uint32_t begin(uint32_t seed) { return seed; }
  static INLINE uint32_t noise(uint32_t state) { return hash(state) & 0xFFFFu; }
};

// The weights of a group that are updated, and their gradients, side by side; room up to whole vectors behind them.
struct Group {
  float* w;
  const float* g;
  int k;           // of them
  int64_t at;      // where their moments begin
  int64_t number;  // of the group in the tensor
};

// Where the chances of a moment's group begin.
template <class Format>
INLINE uint32_t seed_of(const int64_t* row, int number, const Group& s) {
  const auto place = static_cast<uint32_t>(Format::SHARED ? (row[FIRST] / GROUP + s.number) * GROUP : s.at);
  return static_cast<uint32_t>(row[SEED] + number) * 0x9E3779B9u + place;
}

}  // namespace
#include "narrow_avx512.h"
namespace {

// One moment of a group: codes, read as floats; floats kept, which become codes when the largest is known. Passes of
// one width each: loops that turn bytes into floats beside other work vectorize badly.
template <class Format, int LANES>
struct Moment {
  using Code = typename Format::Code;
  using Floats = typename Vectors<LANES>::Floats;

  Code* codes;
  uint8_t* exponent;  // null where the format has none
  int k;
  alignas(64) float values[GROUP + CHUNK];
  alignas(64) uint16_t upper[GROUP + CHUNK];  // halves of floats
  alignas(64) Code own[GROUP + CHUNK];

  INLINE Moment(Code* codes, uint8_t* exponent, int k) : codes(codes), exponent(exponent), k(k) {
    if (!codes) return;  // AMSGrad's, where it is off
    copy(own, codes, k);
    std::memset(own + k, 0, CHUNK * sizeof(Code));
    const uint16_t low = Format::low(exponent ? *exponent : 0);
    for (int begin = 0; begin < k; begin += CHUNK)
      for (int i = begin; i < begin + CHUNK; ++i) upper[i] = Format::widen(own[i], low);
    for (int begin = 0; begin < k; begin += CHUNK)
      for (int i = begin; i < begin + CHUNK; ++i) values[i] = float_of_bits(static_cast<uint32_t>(upper[i]) << 16);
  }

  INLINE Moment(const int64_t* row, int number, const Group& s)
      : Moment(row[MOMENT + number] ? address<Code>(row, MOMENT + number) + s.at : nullptr,
               row[EXPONENTS + number] ? address<uint8_t>(row, EXPONENTS + number) + s.number : nullptr, s.k) {}

  INLINE Floats read(int i) const { return load<Floats>(values + i); }

  INLINE void keep(int i, Floats x) { store(values + i, x); }

  INLINE void write(bool by_chance, uint32_t seed = 0) {
    int shared = 0;
    uint32_t state = Format::begin(seed);
    for (int begin = 0; begin < k; begin += CHUNK)
      for (int i = begin; i < begin + CHUNK; ++i, state += Format::STEP)
        upper[i] = Format::round(bits_of_float(values[i]), by_chance ? Format::noise(state) : Format::NEAREST) >> 16;
    if (Format::SHARED) {
      uint16_t highest = 0;
      for (int begin = 0; begin < k; begin += CHUNK)
        for (int i = begin; i < begin + CHUNK; ++i)
          highest = larger(highest, static_cast<uint16_t>(Format::BY_CHANCE ? upper[i] : upper[i] & 0x7FFF));
      *exponent = shared = exponent_of<Format>(highest);
    }
    const uint16_t low = Format::low(shared);
    for (int begin = 0; begin < k; begin += CHUNK)
      for (int i = begin; i < begin + CHUNK; ++i) own[i] = static_cast<Code>(Format::narrow(upper[i], low));
    copy(codes, own, k);
  }

  INLINE void write(const int64_t* row, int number, const Group& s) {
    write(Format::BY_CHANCE, seed_of<Format>(row, number, s));
  }
};

template <template <bool> class Format, int LANES, bool AMSGRAD>
INLINE void adam_group(const Adam& a, const int64_t* row, const Group& s) {
  using Floats = typename Vectors<LANES>::Floats;
  Moment<Format<true>, LANES> first(row, 0, s);
  Moment<Format<false>, LANES> second(row, 1, s), third(row, 2, s);
  for (int i = 0; i < s.k; i += LANES) {
    Floats m = first.read(i), v = second.read(i), vmax{};
    if (AMSGRAD) vmax = third.read(i);
    store(s.w + i, adam_value(a, load<Floats>(s.w + i), load<Floats>(s.g + i), m, v, AMSGRAD ? &vmax : nullptr));
    first.keep(i, m);
    second.keep(i, v);
    if (AMSGRAD) third.keep(i, vmax);
  }
  first.write(row, 0, s);
  second.write(row, 1, s);
  if (AMSGRAD) third.write(row, 2, s);
}

template <template <bool> class Format, int LANES>
INLINE void adam_group(const Adam& a, const int64_t* row, const Group& s) {
  if (row[MOMENT + 2]) adam_group<Format, LANES, true>(a, row, s);
  else adam_group<Format, LANES, false>(a, row, s);
}

template <template <bool> class Format, int LANES>
INLINE void sgd_group(const Sgd& r, const int64_t* row, const Group& s) {
  using Floats = typename Vectors<LANES>::Floats;
  Moment<Format<true>, LANES> buffer(row, 0, s);
  for (int i = 0; i < s.k; i += LANES) {
    Floats m = buffer.read(i);
    store(s.w + i, sgd_value(r, load<Floats>(s.w + i), load<Floats>(s.g + i), m));
    buffer.keep(i, m);
  }
  buffer.write(row, 0, s);
}

// Weights of the group at `begin` of `count`.
INLINE int group_size(int64_t begin, int64_t count) {
  return static_cast<int>(count - begin < GROUP ? count - begin : GROUP);
}

// Work on the groups of a block: GATHER and SCATTER are those of an instruction set, the last argument updates the
// group `s`, WRITE ends what it left of group `j`. Three passes, for a vector that is read right after parts of it were
// written waits for them.
#define FOR_GROUPS(GATHER, SCATTER, WRITE, ...)                                                        \
  constexpr int STRIDE = GROUP + PAD, GROUPS = BLOCK / GROUP;                                          \
  alignas(64) float ws[GROUPS * STRIDE], gs[GROUPS * STRIDE];                                          \
  const uint8_t* mask = mask_of(row, start);                                                           \
  int kept[GROUPS];                                                                                    \
  for (int j = 0, begin = 0; begin < count; ++j, begin += GROUP) {                                     \
    const int n = kept[j] = group_size(begin, count);                                                  \
    float *own_w = ws + j * STRIDE, *own_g = gs + j * STRIDE;                                          \
    if (!mask && n == GROUP) continue; /* in place */                                                  \
    if (mask) kept[j] = GATHER(w + begin, g + begin, mask + begin / 8, n, own_w, own_g);               \
    else copy(own_w, w + begin, n), copy(own_g, g + begin, n);                                         \
    std::memset(own_w + kept[j], 0, PAD * sizeof(float));                                              \
    std::memset(own_g + kept[j], 0, PAD * sizeof(float));                                              \
  }                                                                                                    \
  int64_t at = moments_at(row, start);                                                                 \
  for (int j = 0, begin = 0; begin < count; ++j, begin += GROUP) {                                     \
    const bool in_place = !mask && kept[j] == GROUP;                                                   \
    const Group s{in_place ? w + begin : ws + j * STRIDE, in_place ? g + begin : gs + j * STRIDE,      \
                  kept[j], at, (start + begin) / GROUP};                                               \
    __VA_ARGS__;                                                                                       \
    at += kept[j];                                                                                     \
  }                                                                                                    \
  for (int j = 0, begin = 0; begin < count; ++j, begin += GROUP) {                                     \
    const int n = group_size(begin, count);                                                            \
    WRITE;                                                                                             \
    if (mask) SCATTER(w + begin, g + begin, mask + begin / 8, n, ws + j * STRIDE);                     \
    else if (n < GROUP) copy(w + begin, ws + j * STRIDE, n);                                           \
  }

#if defined(__x86_64__)
template <template <bool> class Format>
TARGET_AVX512 void adam_block_avx512(const Adam& a, const int64_t* row, int64_t start, int64_t count, float* w,
                                     float* g) {
  Halves halves[BLOCK / GROUP][3];
  FOR_GROUPS(gather_avx512, scatter_avx512, write_codes<Format>(halves[j], row[MOMENT + 2] ? 3 : 2),
             adam_group_avx512<Format>(a, row, s, halves[j]))
}

template <template <bool> class Format>
TARGET_AVX2 void adam_block_avx2(const Adam& a, const int64_t* row, int64_t start, int64_t count, float* w, float* g) {
  FOR_GROUPS(gather_avx2, scatter_avx2, (void)0, adam_group<Format, 8>(a, row, s))
}

template <template <bool> class Format>
TARGET_AVX512 void sgd_block_avx512(const Sgd& r, const int64_t* row, int64_t start, int64_t count, float* w,
                                     float* g) {
  Halves halves[BLOCK / GROUP][1];
  FOR_GROUPS(gather_avx512, scatter_avx512, write_codes<Format>(halves[j], 1),
             sgd_group_avx512<Format>(r, row, s, halves[j]))
}

template <template <bool> class Format>
TARGET_AVX2 void sgd_block_avx2(const Sgd& r, const int64_t* row, int64_t start, int64_t count, float* w, float* g) {
  FOR_GROUPS(gather_avx2, scatter_avx2, (void)0, sgd_group<Format, 8>(r, row, s))
}
#endif

template <template <bool> class Format>
void adam_block(const Adam& a, const int64_t* row, int64_t start, int64_t count, float* w, float* g) {
  FOR_GROUPS(gather_bits, scatter_bits, (void)0, adam_group<Format, 4>(a, row, s))
}

template <template <bool> class Format>
void sgd_block(const Sgd& r, const int64_t* row, int64_t start, int64_t count, float* w, float* g) {
  FOR_GROUPS(gather_bits, scatter_bits, (void)0, sgd_group<Format, 4>(r, row, s))
}

template <template <bool> class Format>
void adam_all(int isa, int threads, int64_t tensors, const int64_t* table, int weight_bytes, const Adam& a) {
  for_all_blocks(isa, threads, tensors, table, weight_bytes,
                 [&](const int64_t* row, int64_t start, int64_t count, float* w, float* g) {
#if defined(__x86_64__)
    if (isa == AVX512) return adam_block_avx512<Format>(a, row, start, count, w, g);
    if (isa == AVX2) return adam_block_avx2<Format>(a, row, start, count, w, g);
#endif
    adam_block<Format>(a, row, start, count, w, g);
  });
}

template <template <bool> class Format>
void sgd_all(int isa, int threads, int64_t tensors, const int64_t* table, int weight_bytes, const Sgd& r) {
  for_all_blocks(isa, threads, tensors, table, weight_bytes,
                 [&](const int64_t* row, int64_t start, int64_t count, float* w, float* g) {
#if defined(__x86_64__)
    if (isa == AVX512) return sgd_block_avx512<Format>(r, row, start, count, w, g);
    if (isa == AVX2) return sgd_block_avx2<Format>(r, row, start, count, w, g);
#endif
    sgd_block<Format>(r, row, start, count, w, g);
  });
}

// Kept values of the group of up to 256 weights that begins at `begin` of `n`.
int num_kept(int64_t n, const uint8_t* mask, int64_t begin) {
  const int count = group_size(begin, n);
  if (!mask) return count;
  int k = 0;
  for (int base = 0; base < count; base += 64) {
    const int left = count - base;
    const uint64_t bits = bits_of(mask + (begin + base) / 8, left < 64 ? left : 64);
    k += __builtin_popcountll(left < 64 ? bits & ((uint64_t{1} << left) - 1) : bits);
  }
  return k;
}

// Calls `work(moment, values before)` on every group of `n` weights.
template <bool SIGNED, class Work>
void for_each_group(int64_t n, const uint8_t* mask, const uint8_t* codes, const uint8_t* exponents, const Work& work) {
  int64_t at = 0;
  for (int64_t begin = 0; begin < n; begin += GROUP) {
    Moment<Int8<SIGNED>, 4> moment(const_cast<uint8_t*>(codes) + at, const_cast<uint8_t*>(exponents) + begin / GROUP,
                                   num_kept(n, mask, begin));
    work(moment, at);
    at += moment.k;
  }
}

template <class Work>
void for_each_group(int64_t n, const uint8_t* mask, int is_signed, const uint8_t* codes, const uint8_t* exponents,
                    const Work& work) {
  if (is_signed) for_each_group<true>(n, mask, codes, exponents, work);
  else for_each_group<false>(n, mask, codes, exponents, work);
}

}  // namespace

extern "C" {

// `hyper` and `weight_bytes` as in packed.cpp; `bytes` of a moment: 1 or 2.
void narrow_adam(int isa, int threads, int64_t tensors, const int64_t* table, const float* hyper, int weight_bytes,
                 int bytes) {
  Adam a;
  std::memcpy(&a, hyper, sizeof(a));
  if (bytes == 1) adam_all<Int8>(isa, threads, tensors, table, weight_bytes, a);
  else adam_all<Bfloat16>(isa, threads, tensors, table, weight_bytes, a);
}

void narrow_sgd(int isa, int threads, int64_t tensors, const int64_t* table, const float* hyper, int nesterov,
                int first, int weight_bytes, int bytes) {
  Sgd r;
  std::memcpy(&r, hyper, 5 * sizeof(float));
  r.nesterov = nesterov;
  r.first = first;
  if (bytes == 1) sgd_all<Int8>(isa, threads, tensors, table, weight_bytes, r);
  else sgd_all<Bfloat16>(isa, threads, tensors, table, weight_bytes, r);
}

// The 8-bit codes of `n` weights, which begin where a group does, as floats; without a mask all are kept.
void narrow_widen(int64_t n, const uint8_t* mask, const uint8_t* codes, const uint8_t* exponents, int is_signed,
                  float* out) {
  for_each_group(n, mask, is_signed, codes, exponents, [&](auto& moment, int64_t at) {
    for (int i = 0; i < moment.k; i += 4) {
      const auto x = moment.read(i);
      std::memcpy(out + at + i, &x, static_cast<size_t>(moment.k - i < 4 ? moment.k - i : 4) * sizeof(float));
    }
  });
}

// And back, to nearest.
void narrow_to_nearest(int64_t n, const uint8_t* mask, const float* values, int is_signed, uint8_t* codes,
                       uint8_t* exponents) {
  for_each_group(n, mask, is_signed, codes, exponents, [&](auto& moment, int64_t at) {
    for (int i = 0; i < moment.k; i += 4) {
      Vectors<4>::Floats x{};
      std::memcpy(&x, values + at + i, static_cast<size_t>(moment.k - i < 4 ? moment.k - i : 4) * sizeof(float));
      moment.keep(i, x);
    }
    moment.write(false);
  });
}
}
