// The forward product for several tokens (more than gemv.h takes, up to SEVERAL).  Lanes run along M, as in product.h,
// but so few tokens would not pay for lists: the metadata of each row is looked up where it is used.
//
//   tile     X transposed [K + R][NV vectors], R the rank of the low-rank branch      shared by the threads
//   sums     [up to BLOCK outputs][TILE]                                              one thread's
//   stretch  columns whose part of the tile stays in L2
#pragma once

#include <type_traits>

#include "product.h"

namespace slope {

constexpr int64_t SEVERAL = 4 * LANES;        // tokens
constexpr int64_t STRETCH_BYTES = 128 << 10;  // of a tile
constexpr int64_t SUMMED = 128;               // columns that are summed up in registers
constexpr int64_t VALUES_AHEAD = 1024;        // bytes of a row of values that are asked for before their turn

// Rows of W at once: enough sums in flight to hide the latency of an addition, and as many as there are registers for.
template <int NV> constexpr int rows_together() {
#if defined(__AVX512F__)
  return NV == 1 ? 8 : NV == 2 ? 6 : 4;
#elif defined(__AVX2__)
  return NV == 4 ? 3 : 4;
#else
  return NV == 2 ? 4 : 2;
#endif
}

// sums [R][NV vectors] += rows of W, columns [k, k1), times `tile`, which starts at column k.
template <class T, int NV, int R>
void add_rows_of(float* sums, const char* tile, const T* values, const uint8_t* pattern, int64_t k, int64_t k1,
                 int64_t K) {
  constexpr int LINE = NV * LANES * int(sizeof(float));  // bytes of the tile that a column has
  const int64_t width = pattern_width(K);
  while (k < k1) {
    Sums<NV, R> in_flight;
    for (const int64_t end = std::min(k1, k + SUMMED); k + 8 <= end; k += 8, tile += 8 * LINE)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const T* from = values + r * (K / 2) + k / 2;
        __builtin_prefetch(reinterpret_cast<const char*>(from) + VALUES_AHEAD);
        in_flight.add_four(r, load_four(from), tile, tables.kept_words[pattern[r * width + k / 8]] * LINE);
      }
    if (k + 4 == k1) {  // half a byte
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        for (int e = 0; e < 2; e++)
          in_flight.add(r, broadcast(to_float(values[r * (K / 2) + k / 2 + e])), tile,
                        uint64_t(tables.kept[pattern[r * width + k / 8] & 15][e]) * LINE);
      k = k1;
    }
    in_flight.add_to(sums);
  }
}

// The same for the low-rank branch, whose weights [R, rank] are dense.
template <class T, int NV, int R> void add_low_rank(float* sums, const char* tile, const T* weights, int64_t rank) {
  constexpr int LINE = NV * LANES * int(sizeof(float));
  Sums<NV, R> in_flight;
  for (int64_t i = 0; i < rank; i++, tile += LINE)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) in_flight.add(r, broadcast(to_float(weights[r * rank + i])), tile, 0);
  in_flight.add_to(sums);
}

template <class T, int NV>
int forward_tile(int threads, Matrix<T> a, const T* values, const uint8_t* pattern, const T* bias, Matrix<T> down,
                 const T* up, int64_t R, T* y, int64_t M, int64_t N, int64_t K) {
  constexpr int LINE = NV * LANES, TOGETHER = rows_together<NV>();
  float* tile = shared_a.floats(std::max<int64_t>(1, K + R) * LINE);
  if (tile == nullptr) return 1;
  const int64_t stretch = STRETCH_BYTES / int64_t(LINE * sizeof(float)) / 64 * 64, stretches = ceil_div(K, stretch);
  parallel(threads, stretches, [&](int64_t begin, int64_t end) {
    const int64_t k0 = begin * stretch;
    pack_transposed(tile + k0 * LINE, LINE, LINE, a, 0, int(M), k0, std::min(K, end * stretch));
  });
  pack_transposed(tile + K * LINE, LINE, LINE, down, 0, int(M), 0, R);
  auto part = [&](int64_t column) { return reinterpret_cast<const char*>(tile + column * LINE); };
  const int64_t size = block_size(N, threads, BLOCK, 8), width = pattern_width(K);
  parallel(threads, ceil_div(N, size), [&](int64_t begin, int64_t end) {
    alignas(64) float sums[BLOCK * TILE];
    for (int64_t n0 = begin * size; n0 < std::min(N, end * size); n0 += size) {
      const int64_t block = std::min(size, N - n0);
      for (int64_t n = 0; n < block; n++)
        std::fill_n(sums + n * TILE, LINE, bias != nullptr ? to_float(bias[n0 + n]) : 0.0f);
      // f(n, rows) for groups of rows of the block; the second is a constant.
      auto for_rows = [&](const auto& f) {
        int64_t n = 0;
        for (; n + TOGETHER <= block; n += TOGETHER) f(n, std::integral_constant<int, TOGETHER>());
        for (; n < block; n++) f(n, std::integral_constant<int, 1>());
      };
      for (int64_t k = 0; k < K; k += stretch)
        for_rows([&](int64_t n, auto rows) {
          add_rows_of<T, NV, rows>(sums + n * TILE, part(k), values + (n0 + n) * (K / 2), pattern + (n0 + n) * width, k,
                                   std::min(K, k + stretch), K);
        });
      if (R > 0)
        for_rows([&](int64_t n, auto rows) {
          add_low_rank<T, NV, rows>(sums + n * TILE, part(K), up + (n0 + n) * R, R);
        });
      store_transposed(y, N, sums, n0, block, int(M));
    }
  });
  return 0;
}

// Y [M, N] = X W^T + bias + down up^T for FEW < M <= SEVERAL.
template <class T>
int forward_several(int threads, Matrix<T> a, const T* values, const uint8_t* pattern, const T* bias, Matrix<T> down,
                    const T* up, int64_t R, T* y, int64_t M, int64_t N, int64_t K) {
  constexpr int UNIT = std::max(8, LANES);  // tokens that are packed together
  auto* const f = [&] {
    switch (ceil_div(M, UNIT) * (UNIT / LANES)) {
#if defined(__AVX512F__)
      case 1: return forward_tile<T, 1>;
#endif
#if defined(__AVX2__)
      case 3: return forward_tile<T, 3>;
#endif
      case 2: return forward_tile<T, 2>;
      default: return forward_tile<T, 4>;
    }
  }();
  return f(threads, a, values, pattern, bias, down, up, R, y, M, N, K);
}

}  // namespace slope
