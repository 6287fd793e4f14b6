// Compress, expand, and the second (column-wise) compression.  Nothing is computed with the numbers: they are moved as
// bits and compared by magnitude, which for floating point is the order of the bits without the sign.
#pragma once

#include "parallel.h"
#include "pattern.h"

namespace slope {

#if defined(__AVX512F__)
// Columns that one step of compress and expand takes with AVX-512: 16 numbers of 32 bits, 32 of 16 bits, none without VBMI2.
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

// dense [WIDE] of values [WIDE / 2].
template <class U> inline void expand_wide(U* dense, const U* values, const uint8_t* pattern) {
  const __m512i kept = _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  __m512i row = _mm512_setzero_si512();
  if constexpr (sizeof(U) == 4) {
    uint16_t bits;
    std::memcpy(&bits, pattern, sizeof bits);
    row = _mm512_mask_expand_epi32(fresh_zero(), bits, kept);
  } else {
#if defined(__AVX512VBMI2__)
    uint32_t bits;
    std::memcpy(&bits, pattern, sizeof bits);
    row = _mm512_mask_expand_epi16(fresh_zero(), bits, kept);
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
  const int64_t width = (K + 7) / 8;
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

// dense[0 .. 8) of one byte; `count` values (4, or 2 in the last byte of a row).
template <class U> inline void expand_byte(U* dense, const U* values, uint8_t byte, int count) {
  U from[5] = {};
  for (int i = 0; i < count; i++) from[i] = values[i];
  const auto& at = tables.expand[byte];
  for (int i = 0; i < 8; i++) dense[i] = from[at[i]];
}

template <class U>
void expand(int threads, const U* values, const uint8_t* pattern, U* dense, int64_t N, int64_t K) {
  const int64_t width = (K + 7) / 8;
  parallel(threads, N, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      int64_t j = 0;
#if defined(__AVX512F__)
      if constexpr (WIDE<U> > 0)
        for (; 8 * j + WIDE<U> <= K; j += WIDE<U> / 8)
          expand_wide(dense + n * K + 8 * j, values + n * (K / 2) + 4 * j, pattern + n * width + j);
#endif
      for (; j < width; j++) {
        const U* v = values + n * (K / 2) + 4 * j;
        U* to = dense + n * K + 8 * j;
        if (8 * j + 8 <= K) {
          if constexpr (sizeof(U) == 4)
            store8(reinterpret_cast<float*>(to),
                   expand8(load_values(reinterpret_cast<const float*>(v)), pattern[n * width + j]));
          else
            expand_byte(to, v, pattern[n * width + j], 4);
        } else {
          U last[8];
          expand_byte(last, v, pattern[n * width + j], 2);
          std::memcpy(to, last, 4 * sizeof(U));
        }
      }
    }
  });
}

// dense[n, k] of the entries that both patterns keep, zeros elsewhere, for 8 rows from n0 on and 8 columns.
template <class U>
inline void expand_both(const U* values, const uint8_t* pattern, const uint8_t* column_pattern, U* dense, int64_t n0,
                        int64_t j, int64_t N, int64_t K) {
  const int64_t width = (K + 7) / 8, column_width = (N + 7) / 8;
  const int64_t rows = std::min<int64_t>(8, N - n0), columns = std::min<int64_t>(8, K - 8 * j);
  uint64_t kept = 0;  // bit r of byte c: column 8 j + c keeps row n0 + r
  for (int64_t c = 0; c < columns; c++)
    kept |= uint64_t(column_pattern[(8 * j + c) * column_width + n0 / 8]) << (8 * c);
  for (int64_t r = 0; r < rows; r++) {
    U whole[8];
    expand_byte(whole, values + (n0 + r) * (K / 2) + 4 * j, pattern[(n0 + r) * width + j], int(columns / 2));
    U* to = dense + (n0 + r) * K + 8 * j;
    for (int64_t c = 0; c < columns; c++) to[c] = kept >> (8 * c + r) & 1 ? whole[c] : U(0);
  }
}

#if defined(__AVX512F__)
// The same for 32 rows and 16 columns from k0 on.
template <class U>
inline void expand_both_wide(const U* values, const uint8_t* pattern, const uint8_t* column_pattern, U* dense,
                             int64_t n0, int64_t k0, int64_t N, int64_t K) {
  const int64_t width = (K + 7) / 8, column_width = (N + 7) / 8;
  alignas(64) uint32_t words[16];  // bit r: the column keeps row n0 + r
  for (int c = 0; c < 16; c++) std::memcpy(&words[c], column_pattern + (k0 + c) * column_width + n0 / 8, 4);
  const __m512i kept = _mm512_load_si512(words);
  for (int r = 0; r < 32; r++) {
    const U* v = values + (n0 + r) * (K / 2) + k0 / 2;
    U* to = dense + (n0 + r) * K + k0;
    const __mmask16 also = _mm512_test_epi32_mask(kept, _mm512_set1_epi32(int(1u << r)));
    uint16_t bits;
    std::memcpy(&bits, pattern + (n0 + r) * width + k0 / 8, sizeof bits);
    if constexpr (sizeof(U) == 4) {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v));
      const __m512i row = _mm512_mask_expand_epi32(fresh_zero(), bits, _mm512_zextsi256_si512(half));
      _mm512_storeu_si512(to, _mm512_maskz_mov_epi32(also, row));
    } else {
#if defined(__AVX512VBMI2__)
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(v));
      const __m256i row = _mm256_mask_expand_epi16(_mm512_castsi512_si256(fresh_zero()), bits, _mm256_zextsi128_si256(half));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_mov_epi16(also, row));
#endif
    }
  }
}
#endif

// W^{R,C} as a dense matrix [N, K].
template <class U>
void expand_double_pruned(int threads, const U* values, const uint8_t* pattern, const uint8_t* column_pattern, U* dense,
                          int64_t N, int64_t K) {
  parallel(threads, ceil_div(N, 32), [&](int64_t begin, int64_t end) {
    for (int64_t n0 = begin * 32; n0 < std::min(N, end * 32); n0 += 32) {
      int64_t k = 0;
#if defined(__AVX512F__)
      if constexpr (WIDE<U> > 0)
        if (n0 + 32 <= N)
          for (; k + 16 <= K; k += 16) expand_both_wide(values, pattern, column_pattern, dense, n0, k, N, K);
#endif
      for (; k < K; k += 8)
        for (int64_t n = n0; n < std::min(N, n0 + 32); n += 8)
          expand_both(values, pattern, column_pattern, dense, n, k / 8, N, K);
    }
  });
}

// The two largest of four in magnitude, the earlier of equals first: a nibble.
template <class U> inline uint8_t largest_two(const U (&v)[4]) {
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

// (W^{R,C})^T in compressed form, column_values [K, N / 2].  With `pick` the column pattern is chosen and written, else
// it is read.  N is a multiple of 4.  Blocks of 32 rows x 64 columns go through a dense copy in L1.
template <class U>
void columns(int threads, const U* values, const uint8_t* pattern, uint8_t* written, const uint8_t* read,
             U* column_values, int64_t N, int64_t K) {
  constexpr int ROWS_IN = 32, COLUMNS_IN = 64;
  const int64_t width = (K + 7) / 8, column_width = (N + 7) / 8;
  parallel(threads, ceil_div(K, COLUMNS_IN), [&](int64_t begin, int64_t end) {
    alignas(64) U dense[ROWS_IN][COLUMNS_IN];
    for (int64_t k0 = begin * COLUMNS_IN; k0 < std::min(K, end * COLUMNS_IN); k0 += COLUMNS_IN)
      for (int64_t n0 = 0; n0 < N; n0 += ROWS_IN) {
        const int64_t rows = std::min<int64_t>(ROWS_IN, N - n0), count = std::min<int64_t>(COLUMNS_IN, K - k0);
        for (int64_t n = 0; n < rows; n++)
          for (int64_t j = 0; j < ceil_div(count, 8); j++)
            expand_byte(&dense[n][8 * j], values + (n0 + n) * (K / 2) + k0 / 2 + 4 * j,
                        pattern[(n0 + n) * width + k0 / 8 + j], k0 + 8 * j + 8 <= K ? 4 : 2);
        for (int64_t c = 0; c < count; c++) {
          U* to = column_values + (k0 + c) * (N / 2) + n0 / 2;
          for (int64_t j = 0; j < ceil_div(rows, 8); j++) {
            const int64_t at = (k0 + c) * column_width + n0 / 8 + j;
            uint8_t byte = written != nullptr ? 0 : read[at];
            for (int64_t half = 0; half < 2 && 8 * j + 4 * half < rows; half++) {
              const int64_t n = 8 * j + 4 * half;
              const U v[4] = {dense[n][c], dense[n + 1][c], dense[n + 2][c], dense[n + 3][c]};
              if (written != nullptr) byte |= uint8_t(largest_two(v) << (4 * half));
              const auto& kept = tables.kept[byte >> (4 * half) & 15];
              to[n / 2] = v[kept[0]];
              to[n / 2 + 1] = v[kept[1]];
            }
            if (written != nullptr) written[at] = byte;
          }
        }
      }
  });
}

}  // namespace slope
