// dV = dY^T X at the kept positions, with AVX-512: lanes run along the rows of W.
//
// A row of W keeps 8 of every 16 columns.  For 16 rows, the e-th kept column of each is one index vector, which does
// not depend on the token: a permutation picks the activation that each row wants, and the product with 16 neighbouring
// numbers of dY is added to 16 sums in a register.
//
//   sums [e][16 rows] += dY[m, n .. n + 16) * permute(X[m, k .. k + 16), index [e][16 rows])     e < 8, for every m
//
// Neither activation is transposed.  With bfloat16 instructions a word holds two neighbouring tokens, and the
// multiplication sums over both.
//
//   STEPS         words along M that are packed at a time: X [STEPS][16], dY [N / 16][STEPS][16]
//   ROWS_PACKED   rows of W whose dY is packed at a time
#pragma once

#include "parallel.h"
#include "pattern.h"
#include "product.h"
#include "stream.h"
#include "words.h"

#if defined(__AVX512F__)

namespace slope {

constexpr int64_t STEPS = 512;
constexpr int64_t STRIP = 64;
constexpr int64_t ROWS_PACKED = 1024;

// to [steps][16] = words of a[m0 .. m0 + rows, j0 .. j0 + count), zeros past them.
template <class T> inline void pack_words(uint32_t* to, Matrix<T> a, int64_t m0, int64_t rows, int64_t j0, int count) {
  constexpr int TERMS = Word<T>::TERMS;
  for (int64_t m = m0; m < m0 + rows; m += TERMS, to += 16) {
    const bool pair = TERMS == 2 && m + 1 < m0 + rows;
    int j = 0;
    if (a.columns == 1) {
      const T* first = a.at(m, j0);
      if constexpr (TERMS == 1)
        for (; j + 8 <= count; j += 8) store8(reinterpret_cast<float*>(to + j), load8(first + j));
      else if (pair)
        for (; j + 8 <= count; j += 8) {
          Half8 even, odd;
          std::memcpy(&even, first + j, sizeof even);
          std::memcpy(&odd, first + a.rows + j, sizeof odd);
          const Int8 words = __builtin_convertvector(even, Int8) | __builtin_convertvector(odd, Int8) << 16;
          std::memcpy(to + j, &words, sizeof words);
        }
    }
    for (; j < count; j++) to[j] = Word<T>::word(a.at(m, j0 + j), pair ? a.at(m + 1, j0 + j) : nullptr);
    for (; j < 16; j++) to[j] = 0;
  }
}

// Metadata of 64 columns for 16 rows: lane r of the first and the second vector holds row r and row 8 + r.
struct Bits {
  __m512i low, high;

  // `bytes` of each row are there, the rest is 0; rows from `count` on repeat the first.
  Bits(const uint8_t* pattern, int64_t width, int count, int64_t bytes) {
    alignas(64) uint64_t rows[16] = {};
    for (int r = 0; r < 16; r++) {
      const uint8_t* p = pattern + (r < count ? r : 0) * width;
      if (bytes >= 8)
        std::memcpy(&rows[r], p, 8);
      else
        std::memcpy(&rows[r], p, bytes);
    }
    low = _mm512_load_si512(rows);
    high = _mm512_load_si512(rows + 8);
  }

  // The 16 bits of columns [16 t, 16 t + 16) of every row.
  __m256i columns(int t) const {
    const __m128i shift = _mm_cvtsi32_si128(16 * t);
    return _mm256_setr_m128i(_mm512_cvtepi64_epi16(_mm512_srl_epi64(low, shift)),
                             _mm512_cvtepi64_epi16(_mm512_srl_epi64(high, shift)));
  }
};

// index [e][row]: the e-th kept of 16 columns, for 16 rows of 16 bits.  Each nibble names two columns; one without two
// bits names some two of its four.
inline void kept_indices(__m512i (&index)[8], __m256i bits) {
  // By nibble: the lowest set bit, and the highest.
  const __m256i first = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 1, 0, 2, 0, 1, 0, 3, 0, 1, 0, 2, 0, 1, 0));
  const __m256i second = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3));
  const __m256i nibble = _mm256_set1_epi8(15);
  // Odd bytes are the columns from 8 on.
  const __m256i start = _mm256_set1_epi16(0x0800);
  for (int half = 0; half < 2; half++) {
    const __m256i n = _mm256_and_si256(half == 0 ? bits : _mm256_srli_epi16(bits, 4), nibble);
    const __m256i base = half == 0 ? start : _mm256_add_epi8(start, _mm256_set1_epi8(4));
    const __m256i a = _mm256_add_epi8(_mm256_shuffle_epi8(first, n), base);
    const __m256i b = _mm256_add_epi8(_mm256_shuffle_epi8(second, n), base);
    index[2 * half] = _mm512_cvtepu16_epi32(_mm256_and_si256(a, _mm256_set1_epi16(255)));
    index[2 * half + 1] = _mm512_cvtepu16_epi32(_mm256_and_si256(b, _mm256_set1_epi16(255)));
    index[4 + 2 * half] = _mm512_cvtepu16_epi32(_mm256_srli_epi16(a, 8));
    index[5 + 2 * half] = _mm512_cvtepu16_epi32(_mm256_srli_epi16(b, 8));
  }
}

// values [16 rows][8], `stride` apart, = or += sums [8][16 rows]; rows from `count` on and values from `kept` on are
// left alone.
template <class T>
inline void store_rows(T* to, int64_t stride, const __m512 (&s)[8], int count, int kept, bool add) {
  for (int half = 0; half < 2; half++) {
    Vec8 r[8];
    for (int e = 0; e < 8; e++)
      r[e] = (Vec8)(half == 0 ? _mm512_castps512_ps256(s[e]) : _mm512_extractf32x8_ps(s[e], 1));
    transpose8(r);
    for (int i = 0; i < 8 && half * 8 + i < count; i++) {
      T* row = to + (half * 8 + i) * stride;
      if (kept == 8)
        store8(row, add ? load8(row) + r[i] : r[i]);
      else
        for (int e = 0; e < kept; e++) row[e] = from_float<T>(add ? to_float(row[e]) + r[i][e] : r[i][e]);
    }
  }
}

template <class T> inline void store_rows(T* to, int64_t stride, const __m512 (&s)[8], int count, int kept) {
  store_rows(to, stride, s, count, kept, false);
}

#if defined(__AVX512BF16__)
// The same without adding: rounded first, so that half as much is transposed.
inline void store_rows(BFloat16* to, int64_t stride, const __m512 (&s)[8], int count, int kept) {
  // Two vectors of 16 rows in one of 16 pairs.
  alignas(64) static constexpr uint16_t PAIRS[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_load_si512(PAIRS);
  __m512i d[4];
  for (int i = 0; i < 4; i++)
    d[i] = _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(s[2 * i + 1], s[2 * i]));
  const __m512i low01 = _mm512_unpacklo_epi32(d[0], d[1]), high01 = _mm512_unpackhi_epi32(d[0], d[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(d[2], d[3]), high23 = _mm512_unpackhi_epi32(d[2], d[3]);
  // Lane q of 128 bits of rows[j] is row 4 q + j.
  const __m512i rows[4] = {_mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
                           _mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)};
  if (count == 16 && kept == 8) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      auto* row = to + j * stride;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(row), _mm512_castsi512_si128(rows[j]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(row + 4 * stride), _mm512_extracti32x4_epi32(rows[j], 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(row + 8 * stride), _mm512_extracti32x4_epi32(rows[j], 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(row + 12 * stride), _mm512_extracti32x4_epi32(rows[j], 3));
    }
    return;
  }
  alignas(64) BFloat16 all[4][4][8];
  for (int j = 0; j < 4; j++) _mm512_store_si512(all[j], rows[j]);
  for (int r = 0; r < count; r++) std::memcpy(to + r * stride, all[r % 4][r / 4], size_t(kept) * sizeof(BFloat16));
}
#endif

template <class T>
int grad_weight_lanes(int threads, Matrix<T> grad, Matrix<T> x, const uint8_t* pattern, T* dv, bool accumulate,
                      int64_t M, int64_t N, int64_t K) {
  using W = Word<T>;
  constexpr int64_t SPAN_TOKENS = STEPS * W::TERMS;
  // Sums over several spans of tokens need float.
  const bool in_place = std::is_same_v<T, float> || M <= SPAN_TOKENS;
  const int64_t kept = K / 2, width = pattern_width(K), strips = ceil_div(K, STRIP);
  const int64_t packed_rows = std::min(ROWS_PACKED, ceil_div(N, 16) * 16);
  const int64_t most_steps = std::min(STEPS, ceil_div(std::max<int64_t>(1, M), W::TERMS));
  uint32_t* grads = reinterpret_cast<uint32_t*>(shared_a.floats(packed_rows * most_steps));
  float* scratch = in_place ? nullptr : shared_b.floats(packed_rows * kept);  // [rows][kept]
  if (grads == nullptr || (!in_place && scratch == nullptr)) return 1;
  // Blocks of 16 columns whose values fill a cache line.
  const int64_t line_blocks = 8 / int64_t(in_place ? sizeof(T) : sizeof(float));
  Failure failed;

  for (int64_t n0 = 0; n0 < N; n0 += ROWS_PACKED) {
    const int64_t rows = std::min(ROWS_PACKED, N - n0), lines = ceil_div(rows, 16);
    for (int64_t m0 = 0; m0 == 0 || m0 < M; m0 += SPAN_TOKENS) {
      const int64_t tokens = std::min(SPAN_TOKENS, M - m0), steps = ceil_div(tokens, W::TERMS);
      const bool add = m0 > 0 || (in_place && accumulate);
      const bool staged = in_place && !add;
      parallel(threads, lines, [&](int64_t begin, int64_t end) {
        for (int64_t l = begin; l < end; l++)
          pack_words(grads + l * steps * 16, grad, m0, tokens, n0 + l * 16, int(std::min<int64_t>(16, rows - l * 16)));
      });
      parallel(threads, strips, [&](int64_t begin, int64_t end) {
        const bool streamed = whole_lines(dv, kept * sizeof(T));
        // What a strip gives for 16 rows: from here whole cache lines go to dV, where rows may share few places in a
        // cache.
        alignas(64) T stage[16 * STRIP / 2];
        uint32_t* panels = reinterpret_cast<uint32_t*>(own.floats(STRIP * most_steps));  // [STRIP / 16][steps][16]
        if (panels == nullptr) {
          failed.note();
          return;
        }
        for (int64_t k0 = begin * STRIP; k0 < std::min(K, end * STRIP); k0 += STRIP) {
          const int64_t blocks = std::min(STRIP / 16, ceil_div(K - k0, 16));
          for (int64_t t = 0; t < blocks; t++)
            pack_words(panels + t * steps * 16, x, m0, tokens, k0 + 16 * t,
                       int(std::min<int64_t>(16, K - k0 - 16 * t)));
          for (int64_t l = 0; l < lines; l++) {
            const int count = int(std::min<int64_t>(16, rows - l * 16));
            const Bits bits(pattern + (n0 + l * 16) * width + k0 / 8, width, count, width - k0 / 8);
            const uint32_t* g = grads + l * steps * 16;
            if (l + 2 < lines)
              for (int r = 32; r < 48; r++) __builtin_prefetch(pattern + (n0 + l * 16 + r) * width + k0 / 8);
            for (int64_t t = 0; t < blocks; t++) {
              const int values = int(std::min<int64_t>(8, (K - k0) / 2 - 8 * t));
              const int64_t at = l * 16 * kept + k0 / 2 + 8 * t;
              __m512i index[8];
              kept_indices(index, bits.columns(int(t)));
              // The rows are far apart: where the next ones will be stored is asked for now, a cache line each.
              if (!(staged && streamed) && t % line_blocks == 0)
                for (int r = 16; r < 32; r++) {
                  if (in_place)
                    __builtin_prefetch(dv + n0 * kept + at + r * kept, 1);
                  else
                    __builtin_prefetch(scratch + at + r * kept, 1);
                }
              __m512 s[8];
              for (int e = 0; e < 8; e++) s[e] = _mm512_setzero_ps();
              const uint32_t* panel = panels + t * steps * 16;
              for (int64_t i = 0; i < steps; i++) {
                const __m512i gradient = _mm512_load_si512(g + i * 16), inputs = _mm512_load_si512(panel + i * 16);
#pragma GCC unroll 8
                for (int e = 0; e < 8; e++)
                  s[e] = W::multiply_add(s[e], _mm512_permutexvar_epi32(index[e], inputs), gradient);
              }
              if (staged)
                store_rows(stage + 8 * t, STRIP / 2, s, 16, 8);
              else if (!in_place)
                store_rows(scratch + at, kept, s, count, values, add);
              else if (add)
                store_rows(dv + n0 * kept + at, kept, s, count, values, true);
              else
                store_rows(dv + n0 * kept + at, kept, s, count, values);
            }
            if (!staged) continue;
            T* to = dv + (n0 + l * 16) * kept + k0 / 2;
            const int64_t there = std::min(STRIP, K - k0) / 2;
            if (there == STRIP / 2 && streamed)
              for (int r = 0; r < count; r++)
                stream_lines(to + r * kept, stage + r * (STRIP / 2), sizeof(T) * (STRIP / 2));
            else if (there == STRIP / 2)
              for (int r = 0; r < count; r++)
                std::memcpy(to + r * kept, stage + r * (STRIP / 2), sizeof(T) * (STRIP / 2));
            else
              for (int r = 0; r < count; r++) std::memcpy(to + r * kept, stage + r * (STRIP / 2), sizeof(T) * there);
          }
        }
        if (staged && streamed) end_streaming();
      });
      if (failed) return 1;
    }
    if (!in_place)
      parallel(threads, rows, [&](int64_t begin, int64_t end) {
        T* to = dv + n0 * kept;
        int64_t i = begin * kept;
        for (; i + 8 <= end * kept; i += 8)
          store8(to + i, accumulate ? load8(to + i) + load8(scratch + i) : load8(scratch + i));
        for (; i < end * kept; i++) to[i] = from_float<T>(accumulate ? to_float(to[i]) + scratch[i] : scratch[i]);
      });
  }
  return 0;
}

}  // namespace slope

#endif
