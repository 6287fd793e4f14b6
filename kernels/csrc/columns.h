// Compress, expand, and the second (column-wise) compression.  Nothing is computed with the numbers: they are moved as
// bits and compared by magnitude, which for floating point is the order of the bits without the sign.
#pragma once

#include <array>

#include "parallel.h"
#include "pattern.h"

namespace slope {

#if defined(__AVX512F__)
// Columns that one step of compress and expand takes with AVX-512: 16 numbers of 32 bits, 32 of 16 bits, none without
// VBMI2.
#if defined(__AVX512VBMI2__)
template <class U> constexpr int64_t WIDE = 64 / sizeof(U);
#else
template <class U> constexpr int64_t WIDE = sizeof(U) == 4 ? 16 : 0;
#endif

// values [WIDE / 2] = the kept of dense [WIDE].
template <class U> inline void compress_wide(U* values, const U* dense, const uint8_t* pattern) {
  const __m512i row = _mm512_loadu_si512(dense);
  __m512i kept = _mm512_setzero_si512();
  if constexpr (sizeof(U) == 4) {
    uint16_t bits;
    std::memcpy(&bits, pattern, sizeof bits);
    kept = _mm512_mask_compress_epi32(fresh_zero(), bits, row);
  } else {
#if defined(__AVX512VBMI2__)
    uint32_t bits;
    std::memcpy(&bits, pattern, sizeof bits);
    kept = _mm512_mask_compress_epi16(fresh_zero(), bits, row);
#endif
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), _mm512_castsi512_si256(kept));
}

// dense [WIDE] of values [WIDE / 2]; without those that a column mask drops, if there is one.
template <class U> inline void expand_wide(U* dense, const U* values, const uint8_t* pattern, const uint8_t* mask) {
  __m512i row = _mm512_setzero_si512();
  if constexpr (sizeof(U) == 4) {
    uint16_t bits;
    std::memcpy(&bits, pattern, sizeof bits);
    const __m256i kept = _mm256_maskz_loadu_epi32(mask != nullptr ? *mask : 255, values);
    row = _mm512_mask_expand_epi32(fresh_zero(), bits, _mm512_zextsi256_si512(kept));
  } else {
#if defined(__AVX512VBMI2__)
    uint32_t bits;
    uint16_t also = 0xffff;
    std::memcpy(&bits, pattern, sizeof bits);
    if (mask != nullptr) std::memcpy(&also, mask, sizeof also);
    const __m256i kept = _mm256_maskz_loadu_epi16(also, values);
    row = _mm512_mask_expand_epi16(fresh_zero(), bits, _mm512_zextsi256_si512(kept));
#endif
  }
  _mm512_storeu_si512(dense, row);
}
#endif

// The lower four lanes, as they are.
inline void store_half(uint32_t* to, Vec8 v) { std::memcpy(to, &v, 4 * sizeof(uint32_t)); }

template <class U>
void compress(int threads, const U* dense, int64_t stride_n, int64_t stride_k, const uint8_t* pattern, U* values,
              int64_t N, int64_t K) {
  const int64_t width = pattern_width(K);
  parallel(threads, N, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      int64_t j = 0;
#if defined(__AVX512F__)
      if (WIDE<U> > 0 && stride_k == 1)
        for (; 8 * j + WIDE<U> <= K; j += WIDE<U> / 8)
          compress_wide(values + n * (K / 2) + 4 * j, dense + n * stride_n + 8 * j, pattern + n * width + j);
#endif
      if constexpr (sizeof(U) == 4)
        if (stride_k == 1)
          for (; 8 * j + 8 <= K; j++) {
            const Vec8 row = load8(reinterpret_cast<const float*>(dense + n * stride_n + 8 * j));
            store_half(values + n * (K / 2) + 4 * j, gather8(row, pattern[n * width + j]));
          }
      for (; j < width; j++) {
        const bool whole = 8 * j + 8 <= K;
        const int count = whole ? 4 : 2;
        // The last byte of a row may have four columns only: nothing beyond them is read, whatever its upper bits say.
        const auto& at = tables.kept[pattern[n * width + j] & (whole ? 255 : 15)];
        const U* from = dense + n * stride_n + 8 * j * stride_k;
        U* to = values + n * (K / 2) + 4 * j;
        for (int e = 0; e < count; e++) to[e] = from[at[e] * stride_k];
      }
    }
  });
}

// dense[0 .. 8) of one byte; `count` values (4, or 2 in the last byte of a row), of which four bits of a mask keep
// some.
template <class U> inline void expand_byte(U* dense, const U* values, uint8_t byte, int count, uint8_t mask) {
  U from[5] = {};
  for (int i = 0; i < count; i++) from[i] = mask >> i & 1 ? values[i] : U(0);
  const auto& at = tables.expand[byte];
  for (int i = 0; i < 8; i++) dense[i] = from[at[i]];
}

// Dense W, or with a column mask W^{R,C}.
template <class U>
void expand(int threads, const U* values, const uint8_t* pattern, const uint8_t* column_mask, U* dense, int64_t N,
            int64_t K) {
  const int64_t width = pattern_width(K);
  parallel(threads, N, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      const uint8_t* mask = column_mask != nullptr ? column_mask + n * mask_width(K) : nullptr;
      int64_t j = 0;
#if defined(__AVX512F__)
      if constexpr (WIDE<U> > 0)
        for (; 8 * j + WIDE<U> <= K; j += WIDE<U> / 8)
          expand_wide(dense + n * K + 8 * j, values + n * (K / 2) + 4 * j, pattern + n * width + j,
                      mask != nullptr ? mask + j / 2 : nullptr);
#endif
      for (; j < width; j++) {
        const U* v = values + n * (K / 2) + 4 * j;
        U* to = dense + n * K + 8 * j;
        const uint8_t byte = pattern[n * width + j], also = mask_bits(mask, j);
        if (8 * j + 8 <= K) {
          if constexpr (sizeof(U) == 4)
            store8(reinterpret_cast<float*>(to),
                   expand_from(reinterpret_cast<const float*>(v), byte, also));
          else
            expand_byte(to, v, byte, 4, also);
        } else {
          U last[8];
          expand_byte(last, v, byte, 2, also);
          std::memcpy(to, last, 4 * sizeof(U));
        }
      }
    }
  });
}

// The two largest of four in magnitude, the earlier of equals first: a nibble.
template <class U> inline uint8_t largest_two(const std::array<U, 4>& v) {
  constexpr U magnitude = U(~U(0)) >> 1;
  U a[4];
  for (int i = 0; i < 4; i++) a[i] = v[i] & magnitude;
  // before[i]: how many go before i; of a pair exactly one does.
  const int g01 = a[1] > a[0], g02 = a[2] > a[0], g03 = a[3] > a[0], g12 = a[2] > a[1], g13 = a[3] > a[1],
            g23 = a[3] > a[2];
  const int before[4] = {g01 + g02 + g03, 1 - g01 + g12 + g13, 2 - g02 - g12 + g23, 3 - g03 - g13 - g23};
  uint8_t nibble = 0;
  for (int i = 0; i < 4; i++) nibble |= uint8_t(before[i] < 2) << i;
  return nibble;
}

constexpr int ROWS_IN = 32, COLUMNS_IN = 64;  // of a block whose dense copy lies in L1

// Calls f(dense, n0, rows, k0, columns) for the blocks of W, or of W^{R,C}; what a block has beyond rows and columns is
// not to be read.  Threads share out columns, in whole bytes of a column mask.
template <class U, class F>
void for_blocks(int threads, const U* values, const uint8_t* pattern, const uint8_t* column_mask, int64_t N, int64_t K,
                const F& f) {
  const int64_t width = pattern_width(K);
  parallel(threads, ceil_div(K, COLUMNS_IN), [&](int64_t begin, int64_t end) {
    alignas(64) U dense[ROWS_IN][COLUMNS_IN];
    for (int64_t k0 = begin * COLUMNS_IN; k0 < std::min(K, end * COLUMNS_IN); k0 += COLUMNS_IN)
      for (int64_t n0 = 0; n0 < N; n0 += ROWS_IN) {
        const int64_t rows = std::min<int64_t>(ROWS_IN, N - n0), count = std::min<int64_t>(COLUMNS_IN, K - k0);
        for (int64_t n = 0; n < rows; n++) {
          const uint8_t* mask = column_mask != nullptr ? column_mask + (n0 + n) * mask_width(K) + k0 / 16 : nullptr;
          for (int64_t j = 0; j < ceil_div(count, 8); j++)
            expand_byte(&dense[n][8 * j], values + (n0 + n) * (K / 2) + k0 / 2 + 4 * j,
                        pattern[(n0 + n) * width + k0 / 8 + j], k0 + 8 * j + 8 <= K ? 4 : 2, mask_bits(mask, j));
        }
        f(dense, n0, rows, k0, count);
      }
  });
}

// Four rows of column c from row n on.
template <class U> inline std::array<U, 4> group_of(const U (&dense)[ROWS_IN][COLUMNS_IN], int64_t n, int64_t c) {
  return {dense[n][c], dense[n + 1][c], dense[n + 2][c], dense[n + 3][c]};
}

// (W^{R,C})^T in compressed form, column_values [K, N / 2] and column_pattern [K, ceil(N / 8)]: of each four rows the
// two largest of what the mask, if there is one, keeps.  N is a multiple of 4.
template <class U>
void compress_columns(int threads, const U* values, const uint8_t* pattern, const uint8_t* column_mask,
                      U* column_values, uint8_t* column_pattern, int64_t N, int64_t K) {
  const int64_t column_width = pattern_width(N);
  for_blocks(threads, values, pattern, column_mask, N, K,
             [&](const auto& dense, int64_t n0, int64_t rows, int64_t k0, int64_t count) {
    for (int64_t c = 0; c < count; c++) {
      U* to = column_values + (k0 + c) * (N / 2) + n0 / 2;
      uint8_t* bytes = column_pattern + (k0 + c) * column_width + n0 / 8;
      for (int64_t n = 0; n < rows; n += 4) {
        const auto v = group_of(dense, n, c);
        const uint8_t nibble = largest_two(v);
        const auto& kept = tables.kept[nibble];
        to[n / 2] = v[kept[0]];
        to[n / 2 + 1] = v[kept[1]];
        if (n % 8 == 0)
          bytes[n / 8] = nibble;
        else
          bytes[n / 8] = uint8_t(bytes[n / 8] | nibble << 4);
      }
    }
  });
}

// The second pruning by magnitude: column_mask [N, ceil(K / 16)].  N is a multiple of 4.
template <class U>
void pick_columns(int threads, const U* values, const uint8_t* pattern, uint8_t* column_mask, int64_t N, int64_t K) {
  const int64_t width = pattern_width(K);
  for_blocks(threads, values, pattern, nullptr, N, K,
             [&](const auto& dense, int64_t n0, int64_t rows, int64_t k0, int64_t count) {
    uint64_t picked[ROWS_IN] = {};  // bit c of row n
    for (int64_t c = 0; c < count; c++)
      for (int64_t n = 0; n < rows; n += 4) {
        const uint64_t nibble = largest_two(group_of(dense, n, c));
        for (int i = 0; i < 4; i++) picked[n + i] |= (nibble >> i & 1) << c;
      }
    for (int64_t n = 0; n < rows; n++) {
      uint8_t* to = column_mask + (n0 + n) * mask_width(K) + k0 / 16;
      for (int64_t j = 0; j < ceil_div(count, 8); j++) {
        const auto& at = tables.kept[pattern[(n0 + n) * width + k0 / 8 + j]];
        uint8_t bits = 0;
        for (int e = 0; e < (k0 + 8 * j + 8 <= K ? 4 : 2); e++)
          bits |= uint8_t((picked[n] >> (8 * j + at[e]) & 1) << e);
        if (j % 2 == 0)
          to[j / 2] = bits;
        else
          to[j / 2] = uint8_t(to[j / 2] | bits << 4);
      }
    }
  });
}

}  // namespace slope
