// Both gradients for few tokens with bfloat16 instructions (AVX512_BF16, VBMI2): vdpbf16ps multiplies pairs of
// neighbours of the sum and adds up, twice as many multiplications an instruction as in float.
//
// The input gradient expands the weight to pairs of neighbouring rows:
//
//   sums [M][64 columns] += dot2(gradient words [M][PAIR_DEPTH / 2], expanded [PAIR_DEPTH / 2][64 columns])
//
// Zeros are multiplied too, but no slot lists must be amortised over many tokens (unlike pairs.h).
// Interleaving two rows of 32 columns leaves their columns in the order 0-3, 8-11, .. and 4-7, 12-15, ..: the sums are
// in that order until they are stored.
//
// The weight gradient picks, by one two-source permutation, the 16 kept of 32 columns of two tokens:
//
//   sums [16 kept] += dot2(permute(words of X [32 columns], index [16 kept]), the gradient of the row)
#pragma once

#include "few_backward.h"
#include "pairs.h"
#include "stream.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)

namespace slope {

constexpr int PAIR_DEPTH = 64;               // rows of W expanded at a time, at most
constexpr int64_t FEW_PAIR_GRADIENTS = 96;  // tokens up to which this is used
constexpr int64_t FEW_PAIR_COLUMNS = 8;     // likewise, double-pruned

// expanded [PAIR_DEPTH / 2][64] words of rows [n0, n0 + depth), columns [k0, k0 + 64); zeros past either.
template <bool WHOLE>
inline void expand_pairs(uint32_t* to, const BFloat16* values, const uint8_t* pattern, const uint8_t* column_mask,
                         int64_t n0, int depth, int64_t k0, int64_t K) {
  const int64_t width = pattern_width(K), columns = std::min<int64_t>(64, K - k0);
  auto row = [&](int n, int half) {
    if (!WHOLE && (n >= depth || 32 * half >= columns)) return _mm512_setzero_si512();
    const uint8_t* p = pattern + (n0 + n) * width + k0 / 8 + 4 * half;
    const BFloat16* v = values + (n0 + n) * (K / 2) + k0 / 2 + 16 * half;
    const int there = WHOLE ? 32 : int(std::min<int64_t>(32, columns - 32 * half));
    uint32_t bits = 0;
    uint16_t kept = 0xffff;
    if (WHOLE)
      std::memcpy(&bits, p, 4);
    else
      std::memcpy(&bits, p, (there + 7) / 8);
    if (column_mask != nullptr) {
      const uint8_t* also = column_mask + (n0 + n) * mask_width(K) + k0 / 16 + 2 * half;
      if (WHOLE)
        std::memcpy(&kept, also, 2);
      else
        std::memcpy(&kept, also, (there + 15) / 16);
    }
    if (!WHOLE) kept = uint16_t(kept & ((1u << there / 2) - 1));
    const __m256i compressed = _mm256_maskz_loadu_epi16(kept, v);
    return _mm512_mask_expand_epi16(fresh_zero(), bits, _mm512_zextsi256_si512(compressed));
  };
  for (int n = 0; n < depth; n += 2, to += 64)
    for (int half = 0; half < 2; half++) {
      const __m512i first = row(n, half), second = row(n + 1, half);
      _mm512_store_si512(to + 32 * half, _mm512_unpacklo_epi16(first, second));
      _mm512_store_si512(to + 32 * half + 16, _mm512_unpackhi_epi16(first, second));
    }
}

// sums [R tokens, `stride` apart][64] += words [R][PAIR_DEPTH / 2] of the gradient times the expanded pairs.
template <int R>
inline void add_pairs(float* sums, int64_t stride, const uint32_t* words, const uint32_t* expanded, int pairs) {
  __m512 s[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < 4; v++) s[r][v] = _mm512_load_ps(sums + r * stride + 16 * v);
  for (int i = 0; i < pairs; i++) {
    __m512bh w[4];
#pragma GCC unroll 8
    for (int v = 0; v < 4; v++) w[v] = (__m512bh)_mm512_load_si512(expanded + 64 * i + 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(int(words[r * (PAIR_DEPTH / 2) + i]));
#pragma GCC unroll 8
      for (int v = 0; v < 4; v++) s[r][v] = _mm512_dpbf16_ps(s[r][v], factor, w[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < 4; v++) _mm512_store_ps(sums + r * stride + 16 * v, s[r][v]);
}

using AddPairs = void (*)(float*, int64_t, const uint32_t*, const uint32_t*, int);
inline constexpr AddPairs add_pairs_of[6] = {add_pairs<1>, add_pairs<2>, add_pairs<3>,
                                             add_pairs<4>, add_pairs<5>, add_pairs<6>};

// words [PAIR_DEPTH / 2] = pairs of a[m, n0 .. n0 + depth), zeros past them.
inline void gradient_words(uint32_t* to, Matrix<BFloat16> a, int64_t m, int64_t n0, int depth) {
  for (int half = 0; half < 2; half++, to += 16) {
    const int there = std::clamp(depth - 32 * half, 0, 32);
    if (a.columns == 1) {
      const __mmask32 mask = first_lanes(there);
      _mm512_store_si512(to, _mm512_maskz_loadu_epi16(mask, a.at(m, n0 + 32 * half)));
    } else {
      alignas(64) BFloat16 row[32] = {};
      for (int n = 0; n < there; n++) row[n] = *a.at(m, n0 + 32 * half + n);
      _mm512_store_si512(to, _mm512_load_si512(row));
    }
  }
}

// dX [M, K] = dY [M, N] W, or dY W^{R,C} with a column mask.  Threads share out columns.
inline int grad_input_pairs(int threads, Matrix<BFloat16> a, const BFloat16* values, const uint8_t* pattern,
                            const uint8_t* column_mask, BFloat16* dx, int64_t M, int64_t N, int64_t K) {
  const int64_t padded = ceil_div(K, 64) * 64, size = block_size(padded, threads, 1 << 20, 64);
  float* sums = shared_a.floats(M * padded);  // [M, K rounded up to 64]
  if (sums == nullptr) return 1;
  const int64_t tiles = ceil_div(M, 6);
  Failure failed;
  parallel(threads, ceil_div(padded, size), [&](int64_t begin, int64_t end) {
    const int64_t k0 = begin * size, k1 = std::min(padded, end * size);
    float* memory = own.floats(M * (PAIR_DEPTH / 2));
    if (memory == nullptr) {
      failed.note();
      return;
    }
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);  // [M][PAIR_DEPTH / 2]
    alignas(64) uint32_t expanded[PAIR_DEPTH / 2 * 64];
    for (int64_t m = 0; m < M; m++) std::fill(sums + m * padded + k0, sums + m * padded + k1, 0.0f);
    const int rows = rows_at_once(M, PAIR_DEPTH);
    for (int64_t n0 = 0; n0 < N; n0 += rows) {
      const int depth = int(std::min<int64_t>(rows, N - n0));
      for (int64_t m = 0; m < M; m++) gradient_words(words + m * (PAIR_DEPTH / 2), a, m, n0, depth);
      for (int64_t k = k0; k < k1; k += 64) {
        prefetch_tile(values, pattern, column_mask, n0, rows, k, k0, k1, 64, AHEAD, N, K);
        if (depth == rows && k + 64 <= K)
          expand_pairs<true>(expanded, values, pattern, column_mask, n0, depth, k, K);
        else
          expand_pairs<false>(expanded, values, pattern, column_mask, n0, depth, k, K);
        for (int64_t t = 0; t < tiles; t++) {
          const int64_t m = M * t / tiles;  // as many tokens in each tile
          const AddPairs add = add_pairs_of[M * (t + 1) / tiles - m - 1];
          add(sums + m * padded + k, padded, words + m * (PAIR_DEPTH / 2), expanded, (depth + 1) / 2);
        }
      }
    }
    // Columns 0-3, 8-11, .. | 4-7, 12-15, .. of 32, back in order.
    alignas(64) uint16_t order[32];
    for (int c = 0; c < 32; c++) order[c] = uint16_t(c / 8 * 4 + c % 4 + (c % 8 < 4 ? 0 : 16));
    const __m512i in_order = _mm512_load_si512(order);
    for (int64_t m = 0; m < M; m++)
      for (int64_t k = k0; k < std::min(K, k1); k += 32) {
        const float* from = sums + m * padded + k;
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(from + 16), _mm512_load_ps(from));
        const int64_t there = std::min<int64_t>(32, K - k);
        const __mmask32 mask = first_lanes(there);
        _mm512_mask_storeu_epi16(dx + m * K + k, mask, _mm512_permutexvar_epi16(in_order, rounded));
      }
  });
  return failed ? 1 : 0;
}

constexpr int64_t FEW_PAIR_OUTER = 16;      // tokens up to which grad_weight_pairs is used
constexpr int64_t OUTER_COLUMNS = 1024;     // columns of X at a time: they stay in L1

// s rounded, + to [count] before if `add`; count <= 16.
inline __m256i rounded_entries(const BFloat16* to, __m512 s, bool add, __mmask16 there) {
  if (add) {
    const __m512i before = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, to));
    s = _mm512_add_ps(s, _mm512_castsi512_ps(_mm512_slli_epi32(before, 16)));
  }
  return (__m256i)_mm512_cvtneps_pbh(s);
}

// What a call has in common for all rows of W.
struct OuterPairs {
  const uint32_t* gradient;  // [pairs][N]
  const uint32_t* words;     // [stretches][pairs][OUTER_COLUMNS]
  const uint8_t* pattern;
  BFloat16* dv;
  bool add, streamed;  // streamed: see stream.h
  int64_t N, K;

  // R rows of dV from n on, a stretch of columns; P pairs of tokens.  Words of X are loaded once for all R.
  template <int P, int R> void rows(int64_t n, int64_t stretch) const {
    const int64_t k0 = stretch * OUTER_COLUMNS, columns = std::min(OUTER_COLUMNS, K - k0), width = pattern_width(K);
    __m512bh factors[R][P];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int i = 0; i < P; i++) factors[r][i] = (__m512bh)_mm512_set1_epi32(int(gradient[i * N + n + r]));
    const uint32_t* x = words + stretch * P * OUTER_COLUMNS;
    const uint8_t* p = pattern + n * width + k0 / 8;
    BFloat16* to = dv + n * (K / 2) + k0 / 2;
    // s [R][16]: the kept of 32 columns from k on, whose bits are given.
    auto entries = [&](__m512 (&s)[R], int64_t k, const uint32_t (&bits)[R]) {
      __m512i index[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const __m512i kept = _mm512_mask_compress_epi16(fresh_zero(), bits[r], _mm512_load_si512(NUMBERS.data()));
        index[r] = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(kept));
        s[r] = _mm512_setzero_ps();
      }
#pragma GCC unroll 8
      for (int i = 0; i < P; i++) {
        const uint32_t* word = x + i * OUTER_COLUMNS + k;
        const __m512i low = _mm512_load_si512(word), high = _mm512_load_si512(word + 16);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
          s[r] = _mm512_dpbf16_ps(s[r], (__m512bh)_mm512_permutex2var_epi32(low, index[r], high), factors[r][i]);
      }
    };
    uint32_t bits[R];
    int64_t k = 0;
    for (; k + 64 <= columns; k += 64) {
      __m512 low[R], high[R];
      for (int r = 0; r < R; r++) std::memcpy(&bits[r], p + r * width + k / 8, 4);
      entries(low, k, bits);
      for (int r = 0; r < R; r++) std::memcpy(&bits[r], p + r * width + k / 8 + 4, 4);
      entries(high, k + 32, bits);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        BFloat16* line = to + r * (K / 2) + k / 2;
        const __m256i first = rounded_entries(line, low[r], add, 0xffff);
        const __m256i second = rounded_entries(line + 16, high[r], add, 0xffff);
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
        if (streamed)
          _mm512_stream_si512(reinterpret_cast<__m512i*>(line), both);
        else
          _mm512_storeu_si512(line, both);
      }
    }
    for (; k < columns; k += 32) {
      const int there = int(std::min<int64_t>(32, columns - k));
      const __mmask16 mask = __mmask16((1u << there / 2) - 1);
      __m512 s[R];
      for (int r = 0; r < R; r++) {
        bits[r] = 0;
        std::memcpy(&bits[r], p + r * width + k / 8, size_t(there + 7) / 8);
      }
      entries(s, k, bits);
      for (int r = 0; r < R; r++) {
        BFloat16* part = to + r * (K / 2) + k / 2;
        _mm256_mask_storeu_epi16(part, mask, rounded_entries(part, s[r], add, mask));
      }
    }
  }

  // Rows [begin, end), all columns.
  template <int P> void all(int64_t begin, int64_t end) const {
    for (int64_t stretch = 0; stretch * OUTER_COLUMNS < K; stretch++) {
      int64_t n = begin;
      for (; n + 2 <= end; n += 2) rows<P, 2>(n, stretch);
      if (n < end) rows<P, 1>(n, stretch);
    }
  }
};

// words [count]: of tokens m and m + 1 of a, columns [j0, j0 + count); zero for a token past M.
inline void token_words(uint32_t* words, Matrix<BFloat16> a, int64_t m, int64_t M, int64_t j0, int64_t count) {
  const bool pair = m + 1 < M;
  int64_t j = 0;
  if (a.columns == 1 && pair)
    for (; j + 16 <= count; j += 16) {
      auto row = [&](int64_t i) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a.at(i, j0 + j))));
      };
      _mm512_storeu_si512(words + j, _mm512_or_si512(row(m), _mm512_slli_epi32(row(m + 1), 16)));
    }
  for (; j < count; j++) words[j] = PairWord::word(a.at(m, j0 + j), pair ? a.at(m + 1, j0 + j) : nullptr);
}

// dV [N, K / 2] = dY^T X at the kept positions.
inline int grad_weight_pairs(int threads, Matrix<BFloat16> grad, Matrix<BFloat16> x, const uint8_t* pattern,
                             BFloat16* dv, bool accumulate, int64_t M, int64_t N, int64_t K) {
  using Rows = void (OuterPairs::*)(int64_t, int64_t) const;
  static constexpr auto rows_of = []<int... p>(std::integer_sequence<int, p...>) {
    return std::array<Rows, FEW_PAIR_OUTER / 2>{&OuterPairs::all<p + 1>...};
  }(std::make_integer_sequence<int, FEW_PAIR_OUTER / 2>());
  const int64_t pairs = ceil_div(M, 2), stretches = ceil_div(K, OUTER_COLUMNS);
  uint32_t* gradient = reinterpret_cast<uint32_t*>(shared_a.floats(N * pairs));
  uint32_t* words = reinterpret_cast<uint32_t*>(shared_b.floats(stretches * pairs * OUTER_COLUMNS));
  if (gradient == nullptr || words == nullptr) return 1;
  for (int64_t i = 0; i < pairs; i++) token_words(gradient + i * N, grad, 2 * i, M, 0, N);
  for (int64_t s = 0; s < stretches; s++)
    for (int64_t i = 0; i < pairs; i++) {
      const int64_t k = s * OUTER_COLUMNS, there = std::min(OUTER_COLUMNS, K - k);
      uint32_t* to = words + (s * pairs + i) * OUTER_COLUMNS;
      token_words(to, x, 2 * i, M, k, there);
      std::fill(to + there, to + OUTER_COLUMNS, 0);
    }
  const bool streamed = !accumulate && whole_lines(dv, K / 2 * sizeof(BFloat16));
  const OuterPairs outer{gradient, words, pattern, dv, accumulate, streamed, N, K};
  const int64_t size = block_size(N, threads, 1 << 20, 16);
  parallel(threads, ceil_div(N, size), [&](int64_t begin, int64_t end) {
    (outer.*rows_of[pairs - 1])(begin * size, std::min(N, end * size));
    if (streamed) end_streaming();
  });
  return 0;
}

}  // namespace slope

#endif
