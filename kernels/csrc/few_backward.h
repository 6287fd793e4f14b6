// Both gradients for few tokens.  Their cost is that of reading or writing the weight, not of the multiplications, so
// nothing is packed and no lists are made: weights are expanded, or activations closed up, eight at a time in registers.
#pragma once

#include <utility>

#include "gemv.h"

namespace slope {

#if defined(__AVX512F__)
constexpr int TOKENS = 6;  // rows of dX in registers, each of SPREAD vectors
#else
constexpr int TOKENS = 3;
#endif
constexpr int SPREAD = 4;
constexpr int STRETCH = SPREAD * LANES;  // columns of dX in registers
constexpr int DEPTH = 32;                // rows of W expanded at a time: bits of a word of the column pattern
constexpr int AHEAD = 3;                 // stretches
// Tokens up to which grad_input_few is used: fewer where pairs (pairs.h) are there for what comes next.
template <class T> constexpr int64_t few_gradients() {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
  if (std::is_same_v<T, BFloat16>) return 16;
#endif
  return 32;
}
// And those up to which grad_weight_few is: fewer where kept_lanes.h is there for what comes next.
#if defined(__AVX512F__)
constexpr int64_t FEW_OUTER = 2;
#else
constexpr int64_t FEW_OUTER = 8;
#endif

// sums [R rows, `stride` apart][STRETCH] += g [R rows, N apart][depth] * w [depth][STRETCH].
template <int R>
inline void add_rows(float* sums, int64_t stride, const float* g, int64_t N, const float* w, int depth) {
  Vec s[R][SPREAD];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < SPREAD; v++) s[r][v] = *reinterpret_cast<const Vec*>(sums + r * stride + v * LANES);
  for (int n = 0; n < depth; n++) {
    Vec row[SPREAD];
#pragma GCC unroll 8
    for (int v = 0; v < SPREAD; v++) row[v] = *reinterpret_cast<const Vec*>(w + n * STRETCH + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec factor = broadcast(g[r * N + n]);
#pragma GCC unroll 8
      for (int v = 0; v < SPREAD; v++) s[r][v] += factor * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < SPREAD; v++) *reinterpret_cast<Vec*>(sums + r * stride + v * LANES) = s[r][v];
}

inline void add_rows(int64_t R, float* sums, int64_t stride, const float* g, int64_t N, const float* w, int depth) {
  switch (R) {
    case 1: return add_rows<1>(sums, stride, g, N, w, depth);
    case 2: return add_rows<2>(sums, stride, g, N, w, depth);
    case 3: return add_rows<3>(sums, stride, g, N, w, depth);
#if defined(__AVX512F__)
    case 4: return add_rows<4>(sums, stride, g, N, w, depth);
    case 5: return add_rows<5>(sums, stride, g, N, w, depth);
    case 6: return add_rows<6>(sums, stride, g, N, w, depth);
#endif
  }
}

#if defined(__AVX512F__)
// expand_tile (below) for whole tiles: DEPTH rows, STRETCH columns, all there.
template <bool DOUBLE, class T>
inline void expand_whole_tile(float* w, const T* values, const uint8_t* pattern, const uint8_t* column_pattern,
                              int64_t n0, int64_t k0, int64_t N, int64_t K) {
  const int64_t width = (K + 7) / 8, column_width = (N + 7) / 8;
  for (int c = 0; c < STRETCH; c += 16) {
    __m512i kept = _mm512_setzero_si512();  // bit n of lane i: column k0 + c + i keeps row n0 + n
    if constexpr (DOUBLE) {
      alignas(64) uint32_t words[16];
      for (int i = 0; i < 16; i++) std::memcpy(&words[i], column_pattern + (k0 + c + i) * column_width + n0 / 8, 4);
      kept = _mm512_load_si512(words);
    }
    for (int n = 0; n < DEPTH; n++) {
      const Vec row = expand_step(values + (n0 + n) * (K / 2) + (k0 + c) / 2, pattern + (n0 + n) * width + (k0 + c) / 8);
      const __mmask16 also = DOUBLE ? _mm512_test_epi32_mask(kept, _mm512_set1_epi32(int(1u << n))) : __mmask16(0xffff);
      _mm512_store_ps(w + n * STRETCH + c, _mm512_maskz_mov_ps(also, (__m512)row));
    }
  }
}
#endif

// w [depth][STRETCH] = rows [n0, n0 + depth) of W, columns [k0, k0 + STRETCH), zeros past K; n0 is a multiple of 8.  With
// a column pattern entries that it does not keep are zero too.
template <bool DOUBLE, class T>
inline void expand_tile(float* w, const T* values, const uint8_t* pattern, const uint8_t* column_pattern, int64_t n0,
                        int depth, int64_t k0, int64_t N, int64_t K) {
#if defined(__AVX512F__)
  if (depth == DEPTH && k0 + STRETCH <= K)
    return expand_whole_tile<DOUBLE>(w, values, pattern, column_pattern, n0, k0, N, K);
#endif
  typedef int32_t Signed8 __attribute__((vector_size(32)));
  const int64_t width = (K + 7) / 8, column_width = (N + 7) / 8;
  for (int c = 0; c < STRETCH; c += 8) {
    const int64_t k = k0 + c;
    if (k >= K) {
      for (int n = 0; n < depth; n++) store8(w + n * STRETCH + c, Vec8{});
      continue;
    }
    const bool whole = k + 8 <= K;
    Int8 bits{};  // lane i: column k + i keeps the row whose bit is the sign
    if constexpr (DOUBLE) {
      uint32_t words[8] = {};
      for (int i = 0; i < (whole ? 8 : 4); i++) {
        const uint8_t* from = column_pattern + (k + i) * column_width + n0 / 8;
        if (depth == DEPTH)
          std::memcpy(&words[i], from, 4);
        else
          std::memcpy(&words[i], from, (depth + 7) / 8);
      }
      std::memcpy(&bits, words, sizeof bits);
      bits <<= 32 - depth;
    }
    const T* v = values + (n0 + depth - 1) * (K / 2) + k / 2;
    const uint8_t* p = pattern + (n0 + depth - 1) * width + k / 8;
    for (int n = depth - 1; n >= 0; n--, v -= K / 2, p -= width) {  // downwards: the first sign is the last row's
      Vec8 row = expand8(whole ? load_values(v) : load_values(v, 2), *p);
      if constexpr (DOUBLE) {
        row = (Vec8)((Signed8)row & ((Signed8)bits >> 31));
        bits += bits;
      }
      store8(w + n * STRETCH + c, row);
    }
  }
}

// dX [M, K] = dY [M, N] W, or dY W^{R,C} with a column pattern.  Threads share out columns.
template <class T>
int grad_input_few(int threads, Matrix<T> a, const T* values, const uint8_t* pattern, const uint8_t* column_pattern,
                   T* dx, int64_t M, int64_t N, int64_t K) {
  const float* g = float_rows(shared_a, a, M, N);
  const int64_t padded = ceil_div(K, STRETCH) * STRETCH;
  float* sums = shared_b.floats(M * padded);  // [M, K rounded up to STRETCH]
  if (g == nullptr || sums == nullptr) return 1;
  const int64_t size = block_size(padded, threads, 1 << 20, STRETCH);
  parallel(threads, ceil_div(padded, size), [&](int64_t begin, int64_t end) {
    const int64_t k0 = begin * size, k1 = std::min(padded, end * size);
    alignas(64) float w[DEPTH * STRETCH];
    for (int64_t m = 0; m < M; m++) std::fill(sums + m * padded + k0, sums + m * padded + k1, 0.0f);
    for (int64_t n0 = 0; n0 < N; n0 += DEPTH) {
      const int depth = int(std::min<int64_t>(DEPTH, N - n0));
      for (int64_t k = k0; k < k1; k += STRETCH) {
        // The rows are far apart, so no hardware sees what comes AHEAD in each: it is asked for now.
        const bool here = k + AHEAD * STRETCH < k1;
        const int64_t column = std::min(K - 1, here ? k + AHEAD * STRETCH : k0 + k + AHEAD * STRETCH - k1);
        for (int n = 0; n < depth; n++) {
          const int64_t row = here ? n0 + n : std::min(N - 1, n0 + DEPTH + n);
          __builtin_prefetch(values + row * (K / 2) + column / 2);
          if (column % 512 < STRETCH) __builtin_prefetch(pattern + row * ((K + 7) / 8) + column / 8);
        }
        if (column_pattern != nullptr)
          expand_tile<true>(w, values, pattern, column_pattern, n0, depth, k, N, K);
        else
          expand_tile<false>(w, values, pattern, column_pattern, n0, depth, k, N, K);
        for (int64_t m = 0; m < M; m += TOKENS)
          add_rows(std::min<int64_t>(TOKENS, M - m), sums + m * padded + k, padded, g + m * N + n0, N, w, depth);
      }
    }
    for (int64_t m = 0; m < M; m++) {
      int64_t k = k0;
      for (; k + 8 <= std::min(K, k1); k += 8) store8(dx + m * K + k, load8(sums + m * padded + k));
      for (; k < std::min(K, k1); k++) dx[m * K + k] = from_float<T>(sums[m * padded + k]);
    }
  });
  return 0;
}

// The kept ones of some neighbouring activations, in order.
#if defined(__AVX512F__)
constexpr int OUTER_STEP = 32;
inline Vec kept_of_step(const float* x, const uint8_t* p) {
  uint32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  const __m512 low = _mm512_maskz_compress_ps(__mmask16(bits), _mm512_loadu_ps(x));
  const __m512 high = _mm512_maskz_compress_ps(__mmask16(bits >> 16), _mm512_loadu_ps(x + 16));
  return (Vec)_mm512_insertf32x8(low, _mm512_castps512_ps256(high), 1);
}
#else
constexpr int OUTER_STEP = 16;
inline Vec8 kept_of_step(const float* x, const uint8_t* p) {
  return SLOPE_SHUFFLE(gather8(load8(x), p[0]), gather8(load8(x + 8), p[1]), 0, 1, 2, 3, 8, 9, 10, 11);
}
#endif

// One row of dV: sums over M rows of x [M, K] at the kept positions, times g[m * N].
template <class T, int M>
inline void outer_row(T* to, const float* g, int64_t N, const float* x, const uint8_t* p, bool accumulate, int64_t K) {
  float factors[M];
  for (int m = 0; m < M; m++) factors[m] = g[m * N];
  int64_t k = 0;
  for (; k + OUTER_STEP <= K; k += OUTER_STEP) {
    auto s = kept_of_step(x + k, p + k / 8) * factors[0];
#pragma GCC unroll 8
    for (int m = 1; m < M; m++) s += kept_of_step(x + m * K + k, p + k / 8) * factors[m];
    Vec8 parts[OUTER_STEP / 16];
    static_assert(sizeof parts == sizeof s);
    std::memcpy(parts, &s, sizeof s);
    for (int i = 0; i < OUTER_STEP / 16; i++) {
      T* part = to + k / 2 + 8 * i;
      store8(part, accumulate ? load8(part) + parts[i] : parts[i]);
    }
  }
  for (; k < K; k += 4) {
    const uint8_t nibble = uint8_t(p[k / 8] >> (k % 8)) & 15;
    for (int e = 0; e < 2; e++) {
      float s = accumulate ? to_float(to[k / 2 + e]) : 0.0f;
      for (int m = 0; m < M; m++) s += x[m * K + k + tables.kept[nibble][e]] * factors[m];
      to[k / 2 + e] = from_float<T>(s);
    }
  }
}

template <class T> using OuterRow = void (*)(T*, const float*, int64_t, const float*, const uint8_t*, bool, int64_t);

// dV [N, K / 2] = dY^T X at the kept positions: a sum of M outer products, each row of which is written once.
template <class T>
int grad_weight_few(int threads, Matrix<T> grad, Matrix<T> x, const uint8_t* pattern, T* dv, bool accumulate, int64_t M,
                    int64_t N, int64_t K) {
  static constexpr auto row_of = []<int... m>(std::integer_sequence<int, m...>) {
    return std::array<OuterRow<T>, FEW_OUTER>{outer_row<T, m + 1>...};
  }(std::make_integer_sequence<int, FEW_OUTER>());
  const float* g = float_rows(shared_a, grad, M, N);
  const float* rows = float_rows(shared_b, x, M, K);
  if (g == nullptr || rows == nullptr) return 1;
  const int64_t size = block_size(N, threads, 1 << 20, 16), width = (K + 7) / 8;
  parallel(threads, ceil_div(N, size), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * size; n < std::min(N, end * size); n++)
      row_of[M - 1](dv + n * (K / 2), g + n, N, rows, pattern + n * width, accumulate, K);
  });
  return 0;
}

}  // namespace slope
