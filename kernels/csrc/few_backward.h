// Both gradients for few tokens.  Their cost is that of reading or writing the weight, not of the multiplications, so
// nothing is packed and no lists are made: weights are expanded, or activations closed up, eight at a time in registers.
#pragma once

#include <optional>
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
constexpr int DEPTH = 32;                // rows of W expanded at a time, at most
constexpr int64_t AHEAD = 6 << 10;       // bytes of values that are asked for before their turn
// Tokens up to which grad_input_few is used.
constexpr int64_t FEW_GRADIENTS = 32;
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

// The column pattern by rows, as the forward storage is read: rows [n0, n0 + count) of the mask, `columns` from k0 on in
// words of 64.  Its own rows are the weight's columns: four bytes at a time of each would touch a cache line a column.
class RowMasks {
 public:
  static constexpr int64_t ROWS = 512;  // of the weight at a time: a cache line of each column

  // Floats of memory for so many columns.
  static int64_t floats(int64_t columns) { return ROWS * ceil_div(columns, 64) * 2; }

  RowMasks(float* memory, const uint8_t* column_pattern, int64_t n0, int64_t count, int64_t k0, int64_t columns, int64_t N,
           int64_t K)
      : words_(reinterpret_cast<uint64_t*>(memory)), stride_(ceil_div(columns, 64)), n0_(n0), k0_(k0) {
    const int64_t column_width = (N + 7) / 8, bytes = (count + 7) / 8;
    alignas(64) uint8_t lines[64][ROWS / 8] = {};  // copied, since columns a power of two apart share few sets of a cache
    for (int64_t w = 0; w < stride_; w++) {
      const int64_t first = k0 + 64 * w, there = std::clamp<int64_t>(K - first, 0, 64);
      const uint8_t* from = column_pattern + first * column_width + n0 / 8;
      for (int64_t c = 0; c < there; c++)
        if (bytes == ROWS / 8)
          std::memcpy(lines[c], from + c * column_width, ROWS / 8);
        else
          std::memcpy(lines[c], from + c * column_width, bytes);
      for (int64_t r0 = 0; r0 < count; r0 += 64) {
        // An eighth of the next 64 columns.
        for (int64_t c = 64 + r0 / 8; c < std::min<int64_t>(72 + r0 / 8, K - first); c++)
          __builtin_prefetch(from + c * column_width, 0, 2);
        uint64_t bits[64] = {};
        for (int64_t c = 0; c < there; c++) std::memcpy(&bits[c], &lines[c][r0 / 8], 8);
        transpose_bits(bits);
        for (int64_t r = 0; r < std::min<int64_t>(64, count - r0); r++) words_[(r0 + r) * stride_ + w] = bits[r];
      }
    }
  }

  const uint8_t* at(int64_t n, int64_t k) const {
    return reinterpret_cast<const uint8_t*>(words_ + (n - n0_) * stride_) + (k - k0_) / 8;
  }
  bool has(int64_t n) const { return n < n0_ + ROWS; }

 private:
  uint64_t* words_;
  int64_t stride_, n0_, k0_;
};

// v where the byte has a bit, 0 elsewhere.
inline Vec8 keep8(Vec8 v, uint8_t byte) {
  constexpr Int8 bits{1, 2, 4, 8, 16, 32, 64, 128};
  return (Vec8)((Int8)v & (Int8)((bits & uint32_t(byte)) != 0));
}

// w [depth][STRETCH] = rows [n0, n0 + depth) of W, columns [k0, k0 + STRETCH), zeros past K.  With masks, entries that
// they do not keep are zero too.
template <class T>
inline void expand_tile(float* w, const T* values, const uint8_t* pattern, const RowMasks* masks, int64_t n0, int depth,
                        int64_t k0, int64_t K) {
  const int64_t width = (K + 7) / 8;
  for (int n = 0; n < depth; n++, w += STRETCH) {
    const T* v = values + (n0 + n) * (K / 2) + k0 / 2;
    const uint8_t* p = pattern + (n0 + n) * width + k0 / 8;
    const uint8_t* also = masks != nullptr ? masks->at(n0 + n, k0) : nullptr;
#if defined(__AVX512F__)
    if (k0 + STRETCH <= K) {
      for (int c = 0; c < STRETCH; c += 16) {
        uint16_t kept = 0xffff;
        if (also != nullptr) std::memcpy(&kept, also + c / 8, 2);
        _mm512_store_ps(w + c, _mm512_maskz_mov_ps(kept, (__m512)expand_step(v + c / 2, p + c / 8)));
      }
      continue;
    }
#endif
    for (int c = 0; c < STRETCH; c += 8) {
      const int64_t k = k0 + c;
      Vec8 row{};
      if (k < K) row = expand8(k + 8 <= K ? load_values(v + c / 2) : load_values(v + c / 2, 2), p[c / 8]);
      store8(w + c, also != nullptr ? keep8(row, also[c / 8]) : row);
    }
  }
}

// Rows of W that are expanded at a time, `most` or fewer: few tokens wait for memory, which hardware brings in time for a
// few rows, and more tokens for the sums of a tile, which are loaded and stored once for all its rows.
inline int rows_at_once(int64_t M, int most) { return M <= 4 ? 8 : M <= 8 ? 16 : most; }

// Asks for what a tile of `rows` rows from n0 on, columns from k on, of [k0, k1), will need some `bytes` of values later:
// further on in the same rows, or at the start of the next ones.
template <class T>
inline void prefetch_tile(const T* values, const uint8_t* pattern, const RowMasks* masks, int64_t n0, int rows, int64_t k,
                          int64_t k0, int64_t k1, int64_t stretch, int64_t bytes, int64_t N, int64_t K) {
  const int64_t line = 64, each = stretch / 2 * int64_t(sizeof(T));
  int64_t column = k + bytes / (rows * each) * stretch;
  for (; column >= k1; column -= k1 - k0) n0 += rows;
  column = std::min(K - 1, column);
  for (int64_t n = n0; n < std::min(N, n0 + rows); n++) {
    const char* from = reinterpret_cast<const char*>(values + n * (K / 2) + column / 2);
    for (int64_t i = 0; i < each; i += line) __builtin_prefetch(from + i);
    if (column % 512 >= stretch) continue;
    __builtin_prefetch(pattern + n * ((K + 7) / 8) + column / 8);
    if (masks != nullptr && masks->has(n)) __builtin_prefetch(masks->at(n, column));
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
  bool failed = false;
  parallel(threads, ceil_div(padded, size), [&](int64_t begin, int64_t end) {
    const int64_t k0 = begin * size, k1 = std::min(padded, end * size);
    float* memory = column_pattern != nullptr ? own.floats(RowMasks::floats(k1 - k0)) : nullptr;
    if (column_pattern != nullptr && memory == nullptr) {
      failed = true;
      return;
    }
    std::optional<RowMasks> masks;
    alignas(64) float w[DEPTH * STRETCH];
    for (int64_t m = 0; m < M; m++) std::fill(sums + m * padded + k0, sums + m * padded + k1, 0.0f);
    const int rows = rows_at_once(M, DEPTH);
    for (int64_t n0 = 0; n0 < N; n0 += rows) {
      const int depth = int(std::min<int64_t>(rows, N - n0));
      if (column_pattern != nullptr && n0 % RowMasks::ROWS == 0)
        masks.emplace(memory, column_pattern, n0, std::min(RowMasks::ROWS, N - n0), k0, k1 - k0, N, K);
      for (int64_t k = k0; k < k1; k += STRETCH) {
        prefetch_tile(values, pattern, masks ? &*masks : nullptr, n0, rows, k, k0, k1, STRETCH, AHEAD, N, K);
        expand_tile(w, values, pattern, masks ? &*masks : nullptr, n0, depth, k, K);
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
  return failed ? 1 : 0;
}

// The kept ones of some neighbouring activations, in order.
#if defined(__AVX512F__)
constexpr int OUTER_STEP = 32;
inline Vec kept_of_step(const float* x, const uint8_t* p) {
  uint32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  const __m512 low = _mm512_mask_compress_ps(_mm512_castsi512_ps(fresh_zero()), __mmask16(bits), _mm512_loadu_ps(x));
  const __m512 high = _mm512_mask_compress_ps(_mm512_castsi512_ps(fresh_zero()), __mmask16(bits >> 16), _mm512_loadu_ps(x + 16));
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
