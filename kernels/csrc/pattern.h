// The packed metadata: bit i (least significant first) of byte [n, j] says that element [n, 8 j + i] is kept.
// Legal bytes have two bits in each nibble, except that a row's last byte may have an empty upper nibble.
// A column mask, uint8 [N, ceil(K / 16)]: bit i of byte [n, j] says that *value* [n, 8 j + i] is in W^{R,C} too.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "vector.h"

namespace slope {

struct Tables {
  // Columns of the kept elements of a byte, in order; unused places repeat 0.
  std::array<std::array<uint8_t, 4>, 256> kept{};
  // The same as four 16-bit numbers in one word.
  std::array<uint64_t, 256> kept_words{};
  // For each of the 8 columns: which of four values lands there, 4 (a zero) if none.
  alignas(64) std::array<std::array<uint32_t, 8>, 256> expand{};

  // Of a byte's kept columns those that four bits of column mask keep too.
  std::array<std::array<uint8_t, 16>, 256> both{};

  // Positions of the set bits of any byte, in order; unused places repeat 0.  The first for shuffles, the second to
  // compute with.
  alignas(64) std::array<std::array<uint32_t, 8>, 256> gather{};
  alignas(64) std::array<std::array<uint16_t, 8>, 256> set_bits{};

  constexpr Tables() {
    for (int byte = 0; byte < 256; byte++) {
      int set = 0;
      for (int bit = 0; bit < 8; bit++)
        if (byte >> bit & 1) {
          gather[byte][set] = uint32_t(bit);
          set_bits[byte][set++] = uint16_t(bit);
        }
      int count = 0;
      for (int column = 0; column < 8; column++) {
        const bool is_kept = (byte >> column & 1) && count < 4;
        expand[byte][column] = is_kept ? count : 4;
        if (is_kept) {
          kept[byte][count] = uint8_t(column);
          kept_words[byte] |= uint64_t(column) << (16 * count);
          for (int mask = 0; mask < 16; mask++) both[byte][mask] |= uint8_t((mask >> count & 1) << column);
          count++;
        }
      }
    }
  }
};
inline constexpr Tables tables{};

// Bytes in a row of the metadata of K columns.
inline int64_t pattern_width(int64_t K) { return (K + 7) / 8; }

// Bytes in a row of a column mask.
inline int64_t mask_width(int64_t K) { return (K / 2 + 7) / 8; }

// The four bits of a row of a column mask, null for all, that belong to the values of byte j of the metadata.
inline uint8_t mask_bits(const uint8_t* row, int64_t j) {
  return row != nullptr ? row[j / 2] >> (j % 2 * 4) & 15 : 15;
}

// Metadata of up to 64 columns without those whose values the mask drops.
inline uint64_t kept_by_both(uint64_t bits, uint32_t mask) {
#if defined(__AVX512F__) && defined(__BMI2__)
  return _pdep_u64(mask, bits);
#else  // AVX2 alone does not tell of a fast one
  uint64_t both = 0;
  for (int j = 0; j < 8; j++) both |= uint64_t(tables.both[bits >> 8 * j & 255][mask >> 4 * j & 15]) << 8 * j;
  return both;
#endif
}

// All ones where four bits are set, else zeros.
alignas(64) inline constexpr std::array<std::array<uint32_t, 4>, 16> LANES_OF = [] {
  std::array<std::array<uint32_t, 4>, 16> lanes{};
  for (int bits = 0; bits < 16; bits++)
    for (int i = 0; i < 4; i++) lanes[bits][i] = bits >> i & 1 ? ~uint32_t(0) : 0;
  return lanes;
}();

// v where four bits are set, 0 elsewhere.
inline Vec4 keep4(Vec4 v, uint8_t bits) {
  Int4 lanes;
  std::memcpy(&lanes, LANES_OF[bits].data(), sizeof lanes);
  return (Vec4)((Int4)v & lanes);
}

// Four values as floats; `count` may be 2 in the last byte of a row.
template <class T> inline Vec4 load_values(const T* p, int count) {
  Vec4 v{};
  for (int i = 0; i < count; i++) v[i] = to_float(p[i]);
  return v;
}
inline Vec4 load_values(const float* p) { return *reinterpret_cast<const AnyVec4*>(p); }
inline Vec4 load_values(const BFloat16* p) {
  typedef uint16_t Half4 __attribute__((vector_size(8)));
  typedef uint32_t Int4 __attribute__((vector_size(16)));
  Half4 h;
  std::memcpy(&h, p, sizeof h);
  return bit_cast<Vec4>(__builtin_convertvector(h, Int4) << 16);
}
inline Vec4 load_values(const Float16* p) {
#if defined(__F16C__)
  return (Vec4)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p));
#else
  return load_values(p, 4);
#endif
}

// The same for lane<i>.
template <class T> inline Four load_four(const T* p) { return four_of(load_values(p)); }

// The eight dense elements of a byte of metadata.
inline Vec8 expand8(Vec4 values, uint8_t byte) {
#if defined(__AVX2__)
  const __m256i index = _mm256_load_si256((const __m256i*)tables.expand[byte].data());
  return (Vec8)_mm256_permutevar8x32_ps(_mm256_zextps128_ps256((__m128)values), index);
#else
  alignas(32) float from[5] = {values[0], values[1], values[2], values[3], 0};
  Vec8 v;
  for (int i = 0; i < 8; i++) v[i] = from[tables.expand[byte][i]];
  return v;
#endif
}

#if defined(__AVX2__)
// Of the eight dense elements of a byte, where the bytes of each are among those of the two values of its nibble and the
// two of the other one; 0x80 (a zero) if it is not kept.
alignas(32) inline constexpr std::array<std::array<uint8_t, 32>, 256> EXPAND_BYTES = [] {
  std::array<std::array<uint8_t, 32>, 256> at{};
  for (int byte = 0; byte < 256; byte++)
    for (int i = 0; i < 32; i++) {
      const uint32_t value = tables.expand[byte][i / 4];
      at[byte][i] = value < 4 ? uint8_t(4 * value + i % 4) : 0x80;
    }
  return at;
}();
#endif

// The eight dense elements of a byte of metadata from the four values at v, without those that `kept` drops.
template <class T> inline Vec8 expand_from(const T* v, uint8_t byte) { return expand8(load_values(v), byte); }
template <class T> inline Vec8 expand_from(const T* v, uint8_t byte, uint8_t kept) {
  return expand8(keep4(load_values(v), kept), byte);
}
#if defined(__AVX2__)
// A load brings the values to both halves of a vector, so that no lane has to leave its 128 bits: on Zen 3 that takes a
// third of the time.
inline Vec8 expand_twice(__m256 values, uint8_t byte) {
  const __m256i at = _mm256_load_si256(reinterpret_cast<const __m256i*>(EXPAND_BYTES[byte].data()));
  return (Vec8)_mm256_shuffle_epi8((__m256i)values, at);
}
inline __m256 twice(const void* four) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(four)); }
inline Vec8 expand_from(const float* v, uint8_t byte) { return expand_twice(twice(v), byte); }
inline Vec8 expand_from(const float* v, uint8_t byte, uint8_t kept) {
  return expand_twice(_mm256_and_ps(twice(v), twice(LANES_OF[kept].data())), byte);
}
#endif

#if defined(__AVX512F__)
// The sixteen dense elements of two bytes of metadata, with zeros for the values that `kept` drops.
template <class T> inline Vec expand_step(const T* v, const uint8_t* p, uint8_t kept = 255) {
  uint16_t mask;
  std::memcpy(&mask, p, 2);
  __m256 eight;
  if constexpr (sizeof(T) == 4)
    eight = _mm256_maskz_loadu_ps(kept, v);
  else
    eight = _mm256_maskz_mov_ps(kept, (__m256)load8(v));
  return (Vec)_mm512_mask_expand_ps(_mm512_castsi512_ps(fresh_zero()), mask, _mm512_zextps256_ps512(eight));
}
#endif

// The elements of v at the set bits of a byte, closed up.
inline Vec8 gather8(Vec8 v, uint8_t byte) {
#if defined(__AVX2__)
  return (Vec8)_mm256_permutevar8x32_ps((__m256)v, _mm256_load_si256((const __m256i*)tables.gather[byte].data()));
#else
  Vec8 result;
  for (int i = 0; i < 8; i++) result[i] = v[tables.gather[byte][i]];
  return result;
#endif
}

// Positions of the set bits of a byte, closed up.
inline Half8 set_bits(uint8_t byte) {
  Half8 positions;
  std::memcpy(&positions, tables.set_bits[byte].data(), sizeof positions);
  return positions;
}

// Groups without exactly two bits, and set bits past K.
inline int64_t illegal_groups(const uint8_t* pattern, int64_t N, int64_t K) {
  const int64_t width = pattern_width(K);
  int64_t wrong = 0;
  for (int64_t n = 0; n < N; n++)
    for (int64_t j = 0; j < width; j++) {
      const uint8_t byte = pattern[n * width + j];
      wrong += __builtin_popcount(byte & 15) != 2;
      wrong += __builtin_popcount(byte >> 4) != (8 * j + 8 <= K ? 2 : 0);
    }
  return wrong;
}

}  // namespace slope
