// What a mask update does with bits, on CPU: bool <-> bits, values <-> survivors, histograms of scores.
//
// Plain loops over 64-bit words, without intrinsics: a mask update is rare, and these run at one survivor in about a
// nanosecond. torch's boolean indexing makes an int64 index for every survivor and took 60 % of a mask update.

#include <cstdint>
#include <cstring>

namespace {

inline uint64_t word_at(const uint8_t* mask, int64_t numel, int64_t word) {
  const int64_t left = numel - word * 64;
  uint64_t bits = 0;
  std::memcpy(&bits, mask + word * 8, left >= 64 ? 8 : static_cast<size_t>((left + 7) / 8));
  return left >= 64 ? bits : bits & ((uint64_t{1} << left) - 1);
}

inline int64_t words_of(int64_t numel) { return (numel + 63) / 64; }

// Order of the value as a signed number; -0.0 counts as 0.0.
inline int32_t key_of(float value) {
  value += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

}  // namespace

extern "C" {

// Runs of 8 bools (0 or 1) to one byte, lowest bit first. The product moves byte i's bit to bit 56 + i.
void bits_pack_bits(int64_t numel, const uint8_t* keep, uint8_t* mask) {
  int64_t i = 0;
  for (; i + 8 <= numel; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, keep + i, 8);
    mask[i / 8] = static_cast<uint8_t>((eight * 0x0102040810204080ull) >> 56);
  }
  if (i < numel) {
    uint8_t last = 0;
    for (int64_t j = i; j < numel; ++j) last |= static_cast<uint8_t>(keep[j] << (j - i));
    mask[i / 8] = last;
  }
}

// Survivors before each block of `block` weights (a multiple of 64); returns their number.
int64_t bits_offsets(int64_t numel, const uint8_t* mask, int64_t block, int32_t* offsets) {
  int64_t count = 0;
  for (int64_t word = 0; word < words_of(numel); ++word) {
    if (word * 64 % block == 0) offsets[word * 64 / block] = static_cast<int32_t>(count);
    count += __builtin_popcountll(word_at(mask, numel, word));
  }
  return count;
}

// values[numel] -> out[survivors]
void bits_compress(int64_t numel, const float* values, const uint8_t* mask, float* out) {
  for (int64_t word = 0; word < words_of(numel); ++word) {
    const float* from = values + word * 64;
    for (uint64_t bits = word_at(mask, numel, word); bits; bits &= bits - 1) *out++ = from[__builtin_ctzll(bits)];
  }
}

// out[i] = 0 where the bit is 0
void bits_zero_pruned(int64_t numel, float* values, const uint8_t* mask) {
  for (int64_t word = 0; word < words_of(numel); ++word) {
    float* at = values + word * 64;
    const int64_t left = numel - word * 64;
    const uint64_t inside = left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
    for (uint64_t bits = ~word_at(mask, numel, word) & inside; bits; bits &= bits - 1) at[__builtin_ctzll(bits)] = 0.0f;
  }
}

// The mask without the survivors marked in drop[survivors].
void bits_thin(int64_t numel, const uint8_t* mask, const uint8_t* drop, uint8_t* out) {
  for (int64_t word = 0; word < words_of(numel); ++word) {
    uint64_t kept = 0;
    for (uint64_t bits = word_at(mask, numel, word); bits; bits &= bits - 1)
      if (!*drop++) kept |= bits & -bits;
    const int64_t left = numel - word * 64;
    std::memcpy(out + word * 8, &kept, left >= 64 ? 8 : static_cast<size_t>((left + 7) / 8));
  }
}

// Adds to counts[2^width] the digits (key >> shift) of the scores whose bits above the digit equal `prefix`; the first
// digit has no bits above it and is counted from the lowest key. Returns how many scores are NaN.
int64_t bits_histogram(int64_t numel, const float* scores, int shift, int width, int32_t prefix, int64_t* counts) {
  int64_t nans = 0;
  if (shift + width == 32) {
    const int32_t half = 1 << (width - 1);
    for (int64_t i = 0; i < numel; ++i) {
      nans += scores[i] != scores[i];
      ++counts[(key_of(scores[i]) >> shift) + half];
    }
    return nans;
  }
  const int32_t digits = (1 << width) - 1;
  for (int64_t i = 0; i < numel; ++i) {
    const int32_t key = key_of(scores[i]);
    if (key >> (shift + width) == prefix) ++counts[(key >> shift) & digits];
  }
  return nans;
}
}
