// The forward product for few tokens (M <= FEW): memory-bound, so each weight is read once, in order, and expanded in
// registers.  Lanes run along K.
#pragma once

#include "parallel.h"
#include "pattern.h"
#include "product.h"

namespace slope {

constexpr int64_t FEW = 8;
constexpr int64_t PREFETCH = 2048;  // bytes ahead of the one stream of values

// Contiguous float rows [M, K] of a, in place if they are that already.  An empty tensor has no address; nullptr says
// that there is no memory.
template <class T> const float* float_rows(Scratch& scratch, Matrix<T> a, int64_t M, int64_t K) {
  if constexpr (std::is_same_v<T, float>)
    if (a.data != nullptr && a.columns == 1 && (a.rows == K || M == 1)) return a.data;
  float* rows = scratch.floats(std::max<int64_t>(1, M * K));
  if (rows != nullptr)
    for (int64_t m = 0; m < M; m++) {
      int64_t k = 0;
      if (a.columns == 1)
        for (; k + 8 <= K; k += 8) store8(rows + m * K + k, load8(a.at(m, k)));
      for (; k < K; k++) rows[m * K + k] = to_float(*a.at(m, k));
    }
  return rows;
}

#if defined(__AVX512F__)
typedef Vec Lane;  // 16 columns a step: two bytes of metadata
#else
typedef Vec8 Lane;  // 8 columns a step
template <class T> inline Vec8 expand_step(const T* v, const uint8_t* p) { return expand_from(v, *p); }
#endif

// A step of a dot product: weights expanded, activations loaded, sums in Lanes.
template <class T> struct FloatStep {
  using Input = float;
  static constexpr int COLUMNS = sizeof(Lane) / sizeof(float);
  static Lane weights(const T* v, const uint8_t* p) { return expand_step(v, p); }
  static void add(Lane& sums, Lane w, const float* x) {
    Lane loaded;
    std::memcpy(&loaded, x, sizeof loaded);
    sums += w * loaded;
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
struct PairStep {
  using Input = BFloat16;
  static constexpr int COLUMNS = 32;
  static __m512i weights(const BFloat16* v, const uint8_t* p) {
    uint32_t mask;
    std::memcpy(&mask, p, 4);
    const __m256i kept = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v));
    return _mm512_mask_expand_epi16(fresh_zero(), mask, _mm512_zextsi256_si512(kept));
  }
  static void add(Lane& sums, __m512i w, const BFloat16* x) {
    sums = (Lane)_mm512_dpbf16_ps((__m512)sums, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
  }
};
template <class T> using DotStep = std::conditional_t<std::is_same_v<T, BFloat16>, PairStep, FloatStep<T>>;
constexpr int64_t FEW_PAIRS = 8;  // tokens
#else
template <class T> using DotStep = FloatStep<T>;
constexpr int64_t FEW_PAIRS = FEW;
#endif
template <class T> constexpr int64_t few() { return std::is_same_v<T, BFloat16> ? FEW_PAIRS : FEW; }

// Contiguous rows [M, K] in the type that the steps read, in place where they are that already.
template <class Input, class T> const Input* input_rows(Scratch& scratch, Matrix<T> a, int64_t M, int64_t K) {
  if constexpr (std::is_same_v<Input, float>) {
    return float_rows(scratch, a, M, K);
  } else {
    if (a.data != nullptr && a.columns == 1 && (a.rows == K || M == 1)) return a.data;
    T* rows = reinterpret_cast<T*>(scratch.floats(std::max<int64_t>(1, ceil_div(M * K, 2))));
    if (rows != nullptr)
      for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k++) rows[m * K + k] = *a.at(m, k);
    return rows;
  }
}

// What columns from `k` on add to sums[m].
template <class T, class Input, int M>
inline void dot_rest(float* sums, const Input* x, const T* v, const uint8_t* p, int64_t k, int64_t K) {
  for (; k < K; k += 4) {
    const uint8_t nibble = uint8_t(p[k / 8] >> (k % 8)) & 15;
    for (int e = 0; e < 2; e++)
      for (int m = 0; m < M; m++) sums[m] += to_float(v[k / 2 + e]) * to_float(x[m * K + k + tables.kept[nibble][e]]);
  }
}

#if defined(__AVX2__)
// totals[m]: lanes to be added up to W[n] . x[m], for M rows x [M, K] and the whole steps of K.
template <class T, int M>
inline void dot_row(Lane (&totals)[M], const typename DotStep<T>::Input* x, const T* v, const uint8_t* p, int64_t K) {
  using Step = DotStep<T>;
  constexpr int STEP = Step::COLUMNS, CHAINS = M == 1 ? 4 : M == 2 ? 2 : 1;  // to hide the latency of an addition
  const int64_t whole = K / STEP * STEP;
  int64_t k = 0;
  Lane s[M][CHAINS] = {};
  for (; k + CHAINS * STEP <= whole; k += CHAINS * STEP) {
    __builtin_prefetch(reinterpret_cast<const char*>(v + k / 2) + PREFETCH);
    if (CHAINS * STEP / 2 * sizeof(T) > 64)
      __builtin_prefetch(reinterpret_cast<const char*>(v + k / 2) + PREFETCH + 64);
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; c++) {
      const auto w = Step::weights(v + (k + c * STEP) / 2, p + (k + c * STEP) / 8);
      for (int m = 0; m < M; m++) Step::add(s[m][c], w, x + m * K + k + c * STEP);
    }
  }
  for (; k < whole; k += STEP) {
    const auto w = Step::weights(v + k / 2, p + k / 8);
    for (int m = 0; m < M; m++) Step::add(s[m][0], w, x + m * K + k);
  }
  for (int m = 0; m < M; m++) {
    totals[m] = s[m][0];
    for (int c = 1; c < CHAINS; c++) totals[m] += s[m][c];
  }
}

// sums [M][8] of rows n to n + 8 (fewer: the last ones repeat): their lanes are added up together.
template <class T, int M>
void dot_rows(float (*sums)[8], const typename DotStep<T>::Input* x, const T* values, const uint8_t* pattern, int rows,
              int64_t K) {
  Vec lanes[M][8];
  const int64_t width = pattern_width(K), whole = K / DotStep<T>::COLUMNS * DotStep<T>::COLUMNS;
  for (int r = 0; r < 8; r++) {
    const int64_t row = std::min(r, rows - 1);
    Lane totals[M];
    if (r < rows) dot_row<T, M>(totals, x, values + row * (K / 2), pattern + row * width, K);
    for (int m = 0; m < M; m++) lanes[m][r] = r < rows ? totals[m] : Vec{};
  }
  for (int m = 0; m < M; m++) store8(sums[m], sums8(lanes[m]));
  if (whole < K)
    for (int r = 0; r < rows; r++) {
      float rest[M] = {};
      dot_rest<T, typename DotStep<T>::Input, M>(rest, x, values + r * (K / 2), pattern + r * width, whole, K);
      for (int m = 0; m < M; m++) sums[m][r] += rest[m];
    }
}
#else
// No permutation by table: the four activations that count are collected instead.
template <class T, int M>
void dot_rows(float (*sums)[8], const float* x, const T* values, const uint8_t* pattern, int rows, int64_t K) {
  const int64_t width = pattern_width(K), whole = K / 8 * 8;
  for (int r = 0; r < rows; r++) {
    const T* v = values + r * (K / 2);
    const uint8_t* p = pattern + r * width;
    Vec4 t[M] = {};
    for (int64_t k = 0; k < whole; k += 8) {
      const Vec4 w = load_values(v + k / 2);
      const auto& at = tables.kept[p[k / 8]];
      for (int m = 0; m < M; m++) {
        const float* row = x + m * K + k;
        t[m] += w * Vec4{row[at[0]], row[at[1]], row[at[2]], row[at[3]]};
      }
    }
    float total[M];
    for (int m = 0; m < M; m++) total[m] = (t[m][0] + t[m][1]) + (t[m][2] + t[m][3]);
    dot_rest<T, float, M>(total, x, v, p, whole, K);
    for (int m = 0; m < M; m++) sums[m][r] = total[m];
  }
}
#endif

template <class T>
using DotRows = void (*)(float (*)[8], const typename DotStep<T>::Input*, const T*, const uint8_t*, int, int64_t);

// down[m] . up[n], the low-rank branch.
template <class T> inline float low_rank(const T* down, const T* up, int64_t R) {
  Vec8 lanes{};
  int64_t r = 0;
  for (; r + 8 <= R; r += 8) lanes += load8(down + r) * load8(up + r);
  float total = 0;
  for (; r < R; r++) total += to_float(down[r]) * to_float(up[r]);
  for (int i = 0; i < 8; i++) total += lanes[i];
  return total;
}

template <class T>
int forward_few(int threads, Matrix<T> a, const T* values, const uint8_t* pattern, const T* bias, const T* down,
                const T* up, int64_t R, T* y, int64_t M, int64_t N, int64_t K) {
  static constexpr DotRows<T> rows_of[FEW] = {dot_rows<T, 1>, dot_rows<T, 2>, dot_rows<T, 3>, dot_rows<T, 4>,
                                              dot_rows<T, 5>, dot_rows<T, 6>, dot_rows<T, 7>, dot_rows<T, 8>};
  const auto* x = input_rows<typename DotStep<T>::Input>(shared_a, a, M, K);
  if (x == nullptr) return 1;
  const int64_t size = block_size(N, threads, 1 << 20, 16), width = pattern_width(K);
  parallel(threads, ceil_div(N, size), [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(N, end * size);
    for (int64_t n = begin * size; n < last; n += 8) {
      const int rows = int(std::min<int64_t>(8, last - n));
      float sums[FEW][8];
      rows_of[M - 1](sums, x, values + n * (K / 2), pattern + n * width, rows, K);
      for (int64_t m = 0; m < M; m++)
        for (int r = 0; r < rows; r++) {
          float total = sums[m][r] + (bias != nullptr ? to_float(bias[n + r]) : 0.0f);
          if (R > 0) total += low_rank(down + m * R, up + (n + r) * R, R);
          y[m * N + n + r] = from_float<T>(total);
        }
    }
  });
  return 0;
}

}  // namespace slope
