// The forward product for few tokens (M <= FEW): memory-bound, so each weight is read once, in order, and expanded in registers.
// Lanes run along K.
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
inline Vec expand_step(const float* v, const uint8_t* p) {
  uint16_t mask;
  std::memcpy(&mask, p, 2);
  return (Vec)_mm512_maskz_expand_ps(mask, _mm512_zextps256_ps512(_mm256_loadu_ps(v)));
}
template <class T> inline Vec expand_step(const T* v, const uint8_t* p) {
  uint16_t mask;
  std::memcpy(&mask, p, 2);
  return (Vec)_mm512_maskz_expand_ps(mask, _mm512_zextps256_ps512((__m256)load8(v)));
}
#else
typedef Vec8 Lane;  // 8 columns a step
template <class T> inline Vec8 expand_step(const T* v, const uint8_t* p) { return expand8(load_values(v), *p); }
#endif
constexpr int STEP = sizeof(Lane) / sizeof(float);

#if defined(__AVX512F__)
inline Lane load_lane(const float* p) { return *reinterpret_cast<const AnyVec*>(p); }
#else
inline Lane load_lane(const float* p) { return load8(p); }
#endif
inline float sum_lane(Lane v) {
  float parts[STEP];
  std::memcpy(parts, &v, sizeof parts);
  for (int step = STEP / 2; step > 0; step /= 2)
    for (int i = 0; i < step; i++) parts[i] += parts[i + step];
  return parts[0];
}

// sums[m] = W[n] . x[m] for M rows x [M, K].
template <class T, int M> inline void dot_row(float* sums, const float* x, const T* v, const uint8_t* p, int64_t K) {
  const int64_t whole = K / STEP * STEP;
  int64_t k = 0;
#if defined(__AVX2__)
  constexpr int CHAINS = M == 1 ? 4 : M == 2 ? 2 : 1;  // independent sums, to hide the latency of an addition
  Lane s[M][CHAINS] = {};
  for (; k + CHAINS * STEP <= whole; k += CHAINS * STEP) {
    __builtin_prefetch(reinterpret_cast<const char*>(v + k / 2) + PREFETCH);
    for (int c = 0; c < CHAINS; c++) {
      const Lane w = expand_step(v + (k + c * STEP) / 2, p + (k + c * STEP) / 8);
      for (int m = 0; m < M; m++) s[m][c] += w * load_lane(x + m * K + k + c * STEP);
    }
  }
  for (; k < whole; k += STEP) {
    const Lane w = expand_step(v + k / 2, p + k / 8);
    for (int m = 0; m < M; m++) s[m][0] += w * load_lane(x + m * K + k);
  }
  for (int m = 0; m < M; m++) {
    Lane total = s[m][0];
    for (int c = 1; c < CHAINS; c++) total += s[m][c];
    sums[m] = sum_lane(total);
  }
#else
  // No permutation by table: the four activations that count are collected instead.
  Vec4 t[M] = {};
  for (; k < whole; k += 8) {
    const Vec4 w = load_values(v + k / 2);
    const auto& at = tables.kept[p[k / 8]];
    for (int m = 0; m < M; m++) {
      const float* row = x + m * K + k;
      t[m] += w * Vec4{row[at[0]], row[at[1]], row[at[2]], row[at[3]]};
    }
  }
  for (int m = 0; m < M; m++) sums[m] = (t[m][0] + t[m][1]) + (t[m][2] + t[m][3]);
#endif
  for (; k < K; k += 4) {
    const uint8_t nibble = uint8_t(p[k / 8] >> (k % 8)) & 15;
    for (int e = 0; e < 2; e++)
      for (int m = 0; m < M; m++) sums[m] += to_float(v[k / 2 + e]) * x[m * K + k + tables.kept[nibble][e]];
  }
}

template <class T>
using DotRow = void (*)(float*, const float*, const T*, const uint8_t*, int64_t);

template <class T>
int forward_few(int threads, Matrix<T> a, const T* values, const uint8_t* pattern, const T* bias, const T* down,
                const T* up, int64_t R, T* y, int64_t M, int64_t N, int64_t K) {
  static constexpr DotRow<T> rows_of[FEW] = {dot_row<T, 1>, dot_row<T, 2>, dot_row<T, 3>, dot_row<T, 4>,
                                             dot_row<T, 5>, dot_row<T, 6>, dot_row<T, 7>, dot_row<T, 8>};
  const float* x = float_rows(shared_a, a, M, K);
  if (x == nullptr) return 1;
  const int64_t size = block_size(N, threads, 1 << 20, 16), width = (K + 7) / 8;
  parallel(threads, ceil_div(N, size), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * size; n < std::min(N, end * size); n++) {
      float sums[FEW];
      rows_of[M - 1](sums, x, values + n * (K / 2), pattern + n * width, K);
      for (int64_t m = 0; m < M; m++) {
        float total = sums[m] + (bias != nullptr ? to_float(bias[n]) : 0.0f);
        if (R > 0) {
          Vec8 low{};
          int64_t r = 0;
          for (; r + 8 <= R; r += 8) low += load8(down + m * R + r) * load8(up + n * R + r);
          float rest = 0;
          for (; r < R; r++) rest += to_float(down[m * R + r]) * to_float(up[n * R + r]);
          for (int i = 0; i < 8; i++) rest += low[i];
          total += rest;
        }
        y[m * N + n] = from_float<T>(total);
      }
    }
  });
  return 0;
}

}  // namespace slope
