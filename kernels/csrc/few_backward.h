// Both gradients for few tokens.  Their cost is that of reading or writing the weight, not of the multiplications, so
// nothing is packed and no lists are made: weights are expanded, or activations closed up, eight at a time in
// registers.
#pragma once

#include <utility>

#include "gemv.h"

namespace slope {

#if defined(__AVX512F__)
constexpr int TOKENS = 6;              // rows of dX in registers, each of SPREAD vectors
constexpr int64_t FEW_GRADIENTS = 32;  // tokens up to which grad_input_few is used
#else
constexpr int TOKENS = 3;
constexpr int64_t FEW_GRADIENTS = 48;
#endif
constexpr int SPREAD = 4;
constexpr int STRETCH = SPREAD * LANES;  // columns of dX in registers
constexpr int DEPTH = 32;                // rows of W expanded at a time, at most
constexpr int64_t AHEAD = 6 << 10;       // bytes of values that are asked for before their turn
// Tokens up to which grad_weight_few is used: fewer where kept_lanes.h or kept_quads.h is there for what comes next.
#if defined(__AVX512F__)
constexpr int64_t FEW_OUTER = 2;
#elif defined(__AVX2__)
constexpr int64_t FEW_OUTER = 4;
#else
constexpr int64_t FEW_OUTER = 8;
#endif

// sums [R rows, `stride` apart][STRETCH] += g [R rows, N apart][depth] * w [depth][STRETCH].
template <int R>
inline void add_rows(float* sums, int64_t stride, const float* g, int64_t N, const float* w, int depth) {
  Vec s[R][SPREAD] = {};  // a sum of partial sums rounds less than one from end to end
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
    for (int v = 0; v < SPREAD; v++) *reinterpret_cast<Vec*>(sums + r * stride + v * LANES) += s[r][v];
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

// w [depth][STRETCH] = rows [n0, n0 + depth) of W, columns [k0, k0 + STRETCH), zeros past K.  With a column mask, what
// it drops is zero too.
template <class T>
inline void expand_tile(float* w, const T* values, const uint8_t* pattern, const uint8_t* column_mask, int64_t n0,
                        int depth, int64_t k0, int64_t K) {
  static_assert(STRETCH % 16 == 0);
  const int64_t width = pattern_width(K);
  for (int n = 0; n < depth; n++, w += STRETCH) {
    const T* v = values + (n0 + n) * (K / 2) + k0 / 2;
    const uint8_t* p = pattern + (n0 + n) * width + k0 / 8;
    const uint8_t* also = column_mask != nullptr ? column_mask + (n0 + n) * mask_width(K) + k0 / 16 : nullptr;
#if defined(__AVX512F__)
    if (k0 + STRETCH <= K) {
      for (int c = 0; c < STRETCH; c += 16)
        _mm512_store_ps(w + c, (__m512)expand_step(v + c / 2, p + c / 8, also != nullptr ? also[c / 16] : 255));
      continue;
    }
#endif
    if (k0 + STRETCH <= K) {
      for (int c = 0; c < STRETCH; c += 16) {
        const T *low = v + c / 2, *high = low + 4;
        const uint8_t first = p[c / 8], last = p[c / 8 + 1], kept = also != nullptr ? also[c / 16] : 255;
        store8(w + c, also != nullptr ? expand_from(low, first, kept & 15) : expand_from(low, first));
        store8(w + c + 8, also != nullptr ? expand_from(high, last, kept >> 4) : expand_from(high, last));
      }
      continue;
    }
    for (int c = 0; c < STRETCH; c += 8) {
      const int64_t k = k0 + c;
      Vec8 row{};
      if (k < K) {
        const Vec4 four = k + 8 <= K ? load_values(v + c / 2) : load_values(v + c / 2, 2);
        row = expand8(also != nullptr ? keep4(four, mask_bits(also, c / 8)) : four, p[c / 8]);
      }
      store8(w + c, row);
    }
  }
}

// Rows of W that are expanded at a time, `most` or fewer: few tokens wait for memory, which hardware brings in time for
// a few rows, and more tokens for the sums of a tile, which are loaded and stored once for all its rows.
inline int rows_at_once(int64_t M, int most) { return M <= 4 ? 8 : M <= 8 ? 16 : most; }

// Asks for what a tile of `rows` rows from n0 on, columns from k on, of [k0, k1), will need some `bytes` of values
// later: further on in the same rows, or at the start of the next ones.
template <class T>
PREFETCHES inline void prefetch_tile(const T* values, const uint8_t* pattern, const uint8_t* column_mask, int64_t n0,
                                     int rows, int64_t k, int64_t k0, int64_t k1, int64_t stretch, int64_t bytes,
                                     int64_t N, int64_t K) {
  const int64_t line = 64, each = stretch / 2 * int64_t(sizeof(T));
  int64_t column = k + bytes / (rows * each) * stretch;
  for (; column >= k1; column -= k1 - k0) n0 += rows;
  column = std::min(K - 1, column);
  for (int64_t n = n0; n < std::min(N, n0 + rows); n++) {
    const char* from = reinterpret_cast<const char*>(values + n * (K / 2) + column / 2);
    for (int64_t i = 0; i < each; i += line) __builtin_prefetch(from + i);
    if (column % 512 >= stretch) continue;
    __builtin_prefetch(pattern + n * pattern_width(K) + column / 8);
    if (column_mask != nullptr) __builtin_prefetch(column_mask + n * mask_width(K) + column / 16);
  }
}

#if !defined(__AVX512F__)
// Tokens up to which the expanded weight is not even stored.
constexpr int64_t DIRECT = 4;

// sums [M, `stride` apart][k0 .. k1) += g [M, N apart][R] W, rows [n0, n0 + R) of W or W^{R,C}.
template <class T, int M, int R, bool MASKED>
inline void add_rows_directly(float* sums, int64_t stride, const float* g, const T* values, const uint8_t* pattern,
                              const uint8_t* column_mask, int64_t n0, int64_t k0, int64_t k1, int64_t N, int64_t K) {
  float factors[M][R];
  const T* v[R];
  const uint8_t *p[R], *also[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    v[r] = values + (n0 + r) * (K / 2);
    p[r] = pattern + (n0 + r) * pattern_width(K);
    also[r] = MASKED ? column_mask + (n0 + r) * mask_width(K) : nullptr;
    for (int m = 0; m < M; m++) factors[m][r] = g[m * N + n0 + r];
  }
  // Eight columns from k on; `half` of a byte of the mask.
  auto add = [&](int64_t k, int half, auto whole) {
    Vec8 s[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) s[m] = load8(sums + m * stride + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const T* from = v[r] + k / 2;
      const uint8_t byte = p[r][k / 8], kept = MASKED ? also[r][k / 16] >> 4 * half & 15 : 15;
      Vec8 row;
      if constexpr (!whole)
        row = expand8(keep4(load_values(from, 2), kept), byte);
      else
        row = MASKED ? expand_from(from, byte, kept) : expand_from(from, byte);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) s[m] += row * factors[m][r];
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) store8(sums + m * stride + k, s[m]);
  };
  auto add_whole = [&](int64_t k, int half) { add(k, half, std::true_type()); };
  const int64_t end = std::min(K, k1);
  int64_t k = k0;  // a multiple of STRETCH
  for (; k + STRETCH <= end; k += STRETCH) {
    // The same columns of the next rows, whose start no hardware foresees.
    for (int r = 0; r < R; r++) __builtin_prefetch(v[r] + R * (K / 2) + k / 2, 0, 2);
#pragma GCC unroll 4
    for (int c = 0; c < STRETCH; c += 16) {
      add_whole(k + c, 0);
      add_whole(k + c + 8, 1);
    }
  }
  for (; k + 8 <= end; k += 8) add_whole(k, k / 8 % 2);
  if (k < end) add(k, k / 8 % 2, std::false_type());
}

template <class T, int M>
void add_directly(float* sums, int64_t stride, const float* g, const T* values, const uint8_t* pattern,
                  const uint8_t* column_mask, int64_t k0, int64_t k1, int64_t N, int64_t K) {
  constexpr auto four = add_rows_directly<T, M, 4, false>, masked = add_rows_directly<T, M, 4, true>;
  constexpr auto one = add_rows_directly<T, M, 1, false>, one_masked = add_rows_directly<T, M, 1, true>;
  int64_t n = 0;
  for (; n + 4 <= N; n += 4)
    (column_mask != nullptr ? masked : four)(sums, stride, g, values, pattern, column_mask, n, k0, k1, N, K);
  for (; n < N; n++)
    (column_mask != nullptr ? one_masked : one)(sums, stride, g, values, pattern, column_mask, n, k0, k1, N, K);
}

template <class T>
void add_directly(int64_t M, float* sums, int64_t stride, const float* g, const T* values, const uint8_t* pattern,
                  const uint8_t* column_mask, int64_t k0, int64_t k1, int64_t N, int64_t K) {
  switch (M) {
    case 1: return add_directly<T, 1>(sums, stride, g, values, pattern, column_mask, k0, k1, N, K);
    case 2: return add_directly<T, 2>(sums, stride, g, values, pattern, column_mask, k0, k1, N, K);
    case 3: return add_directly<T, 3>(sums, stride, g, values, pattern, column_mask, k0, k1, N, K);
    case 4: return add_directly<T, 4>(sums, stride, g, values, pattern, column_mask, k0, k1, N, K);
  }
}
#else
constexpr int64_t DIRECT = 0;
#endif

// dX [M, K] = dY [M, N] W, or dY W^{R,C} with a column mask.  Threads share out columns.
template <class T>
int grad_input_few(int threads, Matrix<T> a, const T* values, const uint8_t* pattern, const uint8_t* column_mask, T* dx,
                   int64_t M, int64_t N, int64_t K) {
  const float* g = float_rows(shared_a, a, M, N);
  const int64_t padded = ceil_div(K, STRETCH) * STRETCH;
  float* sums = shared_b.floats(M * padded);  // [M, K rounded up to STRETCH]
  if (g == nullptr || sums == nullptr) return 1;
  const int64_t size = block_size(padded, threads, 1 << 20, STRETCH);
  parallel(threads, ceil_div(padded, size), [&](int64_t begin, int64_t end) {
    const int64_t k0 = begin * size, k1 = std::min(padded, end * size);
    alignas(64) float w[DEPTH * STRETCH];
    for (int64_t m = 0; m < M; m++) std::fill(sums + m * padded + k0, sums + m * padded + k1, 0.0f);
#if !defined(__AVX512F__)
    if (M <= DIRECT) add_directly(M, sums, padded, g, values, pattern, column_mask, k0, k1, N, K);
#endif
    const int rows = rows_at_once(M, DEPTH);
    for (int64_t n0 = M <= DIRECT ? N : 0; n0 < N; n0 += rows) {
      const int depth = int(std::min<int64_t>(rows, N - n0));
      for (int64_t k = k0; k < k1; k += STRETCH) {
        prefetch_tile(values, pattern, column_mask, n0, rows, k, k0, k1, STRETCH, AHEAD, N, K);
        expand_tile(w, values, pattern, column_mask, n0, depth, k, K);
        for (int64_t m = 0, next; m < M; m = next) {
          // A token alone would wait for its sums.
          next = M - m == TOKENS + 1 ? m + TOKENS - 1 : std::min(M, m + TOKENS);
          add_rows(next - m, sums + m * padded + k, padded, g + m * N + n0, N, w, depth);
        }
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

// Some neighbouring columns of a row of W: picks the kept ones of their activations.  A sum of what it picks for several
// tokens is put in order once, at the end.
#if defined(__AVX512F__)
constexpr int OUTER_STEP = 32;
struct KeptOfStep {
  uint32_t bits;
  explicit KeptOfStep(const uint8_t* p) { std::memcpy(&bits, p, sizeof bits); }
  Vec operator()(const float* x) const {
    const __m512 low = _mm512_mask_compress_ps(_mm512_castsi512_ps(fresh_zero()), __mmask16(bits), _mm512_loadu_ps(x));
    const __m512 zero = _mm512_castsi512_ps(fresh_zero());
    const __m512 high = _mm512_mask_compress_ps(zero, __mmask16(bits >> 16), _mm512_loadu_ps(x + 16));
    return (Vec)_mm512_insertf32x8(low, _mm512_castps512_ps256(high), 1);
  }
  static Vec in_order(Vec sums) { return sums; }
};
#elif defined(__AVX2__)
constexpr int OUTER_STEP = 16;
// The two kept columns of each nibble of a byte, twice.
alignas(32) inline constexpr std::array<std::array<uint32_t, 8>, 256> KEPT_TWICE = [] {
  std::array<std::array<uint32_t, 8>, 256> at{};
  for (int byte = 0; byte < 256; byte++)
    for (int i = 0; i < 8; i++) at[byte][i] = tables.kept[byte >> 4 * (i / 4) & 15][i % 2];
  return at;
}();

// Four groups of four columns.  A permutation within 128 bits is a fraction of one across them: of each group the kept
// pair goes to both halves of its 128 bits, and the halves are taken in turn from the first and the last eight columns.
struct KeptOfStep {
  __m256i first, last;
  explicit KeptOfStep(const uint8_t* p)
      : first(_mm256_load_si256((const __m256i*)KEPT_TWICE[p[0]].data())),
        last(_mm256_load_si256((const __m256i*)KEPT_TWICE[p[1]].data())) {}
  Vec8 operator()(const float* x) const {  // groups 0, 2, 1, 3
    const __m256 low = _mm256_permutevar_ps(_mm256_loadu_ps(x), first);
    return (Vec8)_mm256_blend_ps(low, _mm256_permutevar_ps(_mm256_loadu_ps(x + 8), last), 0xCC);
  }
  static Vec8 in_order(Vec8 sums) { return (Vec8)_mm256_permute4x64_pd((__m256d)sums, 0xD8); }
};
#else
constexpr int OUTER_STEP = 16;
struct KeptOfStep {
  const uint8_t* p;
  explicit KeptOfStep(const uint8_t* p) : p(p) {}
  Vec8 operator()(const float* x) const {
    return SLOPE_SHUFFLE(gather8(load8(x), p[0]), gather8(load8(x + 8), p[1]), 0, 1, 2, 3, 8, 9, 10, 11);
  }
  static Vec8 in_order(Vec8 sums) { return sums; }
};
#endif

// One row of dV: sums over M rows of x [M, K] at the kept positions, times g[m * N].
template <class T, int M>
inline void outer_row(T* to, const float* g, int64_t N, const float* x, const uint8_t* p, bool accumulate, int64_t K) {
  float factors[M];
  for (int m = 0; m < M; m++) factors[m] = g[m * N];
  int64_t k = 0;
  for (; k + OUTER_STEP <= K; k += OUTER_STEP) {
    const KeptOfStep kept(p + k / 8);
    auto s = kept(x + k) * factors[0];
#pragma GCC unroll 8
    for (int m = 1; m < M; m++) s += kept(x + m * K + k) * factors[m];
    s = KeptOfStep::in_order(s);
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
  const int64_t size = block_size(N, threads, 1 << 20, 16), width = pattern_width(K);
  parallel(threads, ceil_div(N, size), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * size; n < std::min(N, end * size); n++)
      row_of[M - 1](dv + n * (K / 2), g + n, N, rows, pattern + n * width, accumulate, K);
  });
  return 0;
}

}  // namespace slope
