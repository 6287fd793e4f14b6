// dV = dY^T X at the kept positions only, in the compressed layout: no dense [N, K] gradient anywhere.
//
// Lanes run along M.  For one row n and 16 columns, eight sums (the eight kept columns) stay in registers while dY[:,
// n] is multiplied with eight rows of X^T; their lanes are then added up by one 8 x 8 transpose.
//
//   PART   tokens of a tile: 16 columns of X^T [16, PART] stay in L1
//   SPAN   tokens packed at a time
//   ROWS_AT_A_TIME, COLUMNS_AT_A_TIME   of dY^T and X^T packed at a time
#pragma once

#include "product.h"

namespace slope {

constexpr int PART = 256;
constexpr int64_t SPAN = 1024;
constexpr int64_t ROWS_AT_A_TIME = 1024;
constexpr int64_t COLUMNS_AT_A_TIME = 512;
constexpr int64_t GRADIENT_BLOCK = 32;
static_assert(SPAN % PART == 0);

// a[i0 .. i0 + span, j0 .. j1) -> [tiles of PART][j1 - j0][PART], zero padded to pairs of vectors.
template <class T>
void pack_parts(int threads, float* to, Matrix<T> a, int64_t i0, int64_t span, int64_t j0, int64_t j1) {
  const int64_t tiles = ceil_div(span, PART), strips = ceil_div(j1 - j0, 32);
  parallel(threads, tiles * strips, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t t = i / strips, first = j0 + i % strips * 32;
      const int count = int(std::min<int64_t>(PART, span - t * PART));
      const int lanes = int(ceil_div(count, 2 * LANES) * 2 * LANES);
      pack_transposed(to + (t * (j1 - j0) + first - j0) * PART, PART, lanes, a, i0 + t * PART, count, first,
                      std::min(j1, first + 32));
    }
  });
}

// The eight sums of row g [PART] with the kept rows of x [16][PART].
inline Vec8 kept_products(const float* g, const float* x, const uint8_t* bytes, int vectors) {
  const Vec* row[8];
  for (int e = 0; e < 8; e++) {
    const int column = (e / 4) * 8 + tables.kept[bytes[e / 4]][e % 4];
    row[e] = reinterpret_cast<const Vec*>(x + column * PART);
  }
  const Vec* grad = reinterpret_cast<const Vec*>(g);
  Vec s[8] = {};
  // Neighbouring loads take opposite halves of a cache line: two from the same half would wait for each other.
  for (int v = 0; v < vectors; v += 2)
    for (int half = 0; half < 2; half++)
      for (int e = 0; e < 8; e++) s[e] += grad[v + (e + half) % 2] * row[e][v + (e + half) % 2];
  return sums8(s);
}

template <class T>
int grad_weight(int threads, Matrix<T> grad, Matrix<T> x, const uint8_t* pattern, T* dv, bool accumulate, int64_t M,
                int64_t N, int64_t K) {
  constexpr bool direct = std::is_same_v<T, float>;  // sums over spans of M need float
  const int64_t kept = K / 2, width = pattern_width(K), span = std::min(SPAN, ceil_div(M, PART) * PART);
  float* grads = shared_a.floats(std::max<int64_t>(1, span * std::min(N, ROWS_AT_A_TIME)));
  float* inputs = shared_b.floats(std::max<int64_t>(1, span * ceil_div(std::min(K, COLUMNS_AT_A_TIME), 16) * 16));
  float* scratch = direct ? reinterpret_cast<float*>(dv)
                          : shared_c.floats(std::max<int64_t>(1, std::min(N, ROWS_AT_A_TIME) * kept));
  if (grads == nullptr || inputs == nullptr || (scratch == nullptr && N * kept > 0)) return 1;

  for (int64_t n0 = 0; n0 < N; n0 += ROWS_AT_A_TIME) {
    const int64_t rows = std::min(ROWS_AT_A_TIME, N - n0), size = block_size(rows, threads, GRADIENT_BLOCK, 1);
    float* out = direct ? scratch + n0 * kept : scratch;  // [rows][kept]
    if (M == 0 && !(direct && accumulate)) std::fill_n(out, rows * kept, 0.0f);
    for (int64_t m0 = 0; m0 < M; m0 += SPAN) {
      const int64_t tokens = std::min(SPAN, M - m0), tiles = ceil_div(tokens, PART);
      pack_parts(threads, grads, grad, m0, tokens, n0, n0 + rows);
      for (int64_t k0 = 0; k0 < K; k0 += COLUMNS_AT_A_TIME) {
        const int64_t k1 = std::min(K, k0 + COLUMNS_AT_A_TIME), columns = k1 - k0;
        pack_parts(threads, inputs, x, m0, tokens, k0, k1);
        parallel(threads, ceil_div(rows, size), [&](int64_t begin, int64_t end) {
          for (int64_t b = begin; b < end; b++)
            for (int64_t k = k0; k < k1; k += 16)
              for (int64_t t = 0; t < tiles; t++) {
                const int vectors = 2 * int(ceil_div(std::min<int64_t>(PART, tokens - t * PART), 2 * LANES));
                const bool first = m0 == 0 && t == 0 && !(direct && accumulate);
                for (int64_t n = b * size; n < std::min(rows, (b + 1) * size); n++) {
                  const uint8_t* p = pattern + (n0 + n) * width + k / 8;
                  // Past the end of a row no column is kept: the sums are those of column 0, and not stored.
                  const uint8_t bytes[2] = {p[0], k + 8 < k1 ? p[1] : uint8_t(0)};
                  const float* tile = inputs + (t * columns + k - k0) * PART;
                  const Vec8 sums = kept_products(grads + (t * rows + n) * PART, tile, bytes, vectors);
                  float* to = out + n * kept + k / 2;
                  __builtin_prefetch(to + 8 * kept, 1);
                  const int64_t count = std::min<int64_t>(8, (k1 - k) / 2);
                  if (count == 8)
                    store8(to, first ? sums : load8(to) + sums);
                  else
                    for (int64_t i = 0; i < count; i++) to[i] = first ? sums[i] : to[i] + sums[i];
                }
              }
        });
      }
    }
    if constexpr (!direct)
      parallel(threads, rows, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * kept; i < end * kept; i++) {
          T& to = dv[n0 * kept + i];
          to = from_float<T>(accumulate ? to_float(to) + out[i] : out[i]);
        }
      });
  }
  return 0;
}

}  // namespace slope
