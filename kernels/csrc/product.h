// Y = A S for sparse S, A having 16 rows or more: the forward product and both input gradients.
//
//   forward       Y  [M, N] = X  [M, K] W^T      reduction over K, outputs N
//   grad_input    dX [M, K] = dY [M, N] W        reduction over N, outputs K
//
// Lanes run along M.  The activations are packed transposed into tiles [reduction, TILE]; for each output the kernel
// walks a list of (weight, row of the tile) and adds weight * row into registers: half of the multiplies of a dense
// product are never issued.  The lists of a block of outputs and a chunk of the reduction are made once from values and
// metadata and serve every tile of a panel.
//
//   panel   PANEL rows of A, packed [tiles][reduction][TILE]     shared by the threads
//   block   up to BLOCK outputs                                  one thread's
//   chunk   CHUNK of the reduction: a tile's part of it stays in L1
#pragma once

#include "bits.h"
#include "parallel.h"
#include "pattern.h"

namespace slope {

#if defined(__AVX512F__)
constexpr int VECTORS = 4, ROWS = 2;  // 64 lanes of M a tile; two outputs at once
#elif defined(__AVX2__)
constexpr int VECTORS = 8, ROWS = 1;
#else
constexpr int VECTORS = 8, ROWS = 1;  // 32 lanes
#endif
constexpr int TILE = VECTORS * LANES;
constexpr int CHUNK = 64;
constexpr int BLOCK = 64;
constexpr int64_t PANEL = 1024;
constexpr int64_t PANEL_FLOATS = 8 << 20;  // of the packed panel, about
static_assert(CHUNK * TILE * sizeof(float) <= 65536, "offsets are 16 bits");

// A matrix in memory: element [i, j] at data[i * rows + j * columns].
template <class T> struct Matrix {
  const T* data;
  int64_t rows, columns;
  const T* at(int64_t i, int64_t j) const { return data + i * rows + j * columns; }
};

// tile[j - j0][i - i0] = a[i, j] for i in [i0, i0 + count), j in [j0, j1); zeros up to `lanes` rows, a multiple of 8.
// Rows of the tile are `stride` floats apart.
template <class T>
inline void pack_transposed(float* tile, int stride, int lanes, Matrix<T> a, int64_t i0, int count, int64_t j0,
                            int64_t j1) {
  for (int i = 0; i < lanes; i += 8) {
    const int rows = std::min(8, std::max(0, count - i));
    int64_t j = j0;
    if (rows == 8 && a.columns == 1) {
      for (; j + 8 <= j1; j += 8) {
        Vec8 r[8];
        for (int s = 0; s < 8; s++) r[s] = load8(a.at(i0 + i + s, j));
        transpose8(r);
        for (int s = 0; s < 8; s++) store8(tile + (j - j0 + s) * stride + i, r[s]);
      }
    } else if (rows == 8 && a.rows == 1) {
      for (; j < j1; j++) store8(tile + (j - j0) * stride + i, load8(a.at(i0 + i, j)));
    }
    for (; j < j1; j++) {
      float* to = tile + (j - j0) * stride + i;
      for (int s = 0; s < 8; s++) to[s] = s < rows ? to_float(*a.at(i0 + i + s, j)) : 0.0f;
    }
  }
}

// For each output of a block: which rows of a tile count, and how much.
struct Lists {
  float* weights;     // [BLOCK][CHUNK]
  uint16_t* offsets;  // [BLOCK][CHUNK], in bytes from the start of the tile's part of this chunk
  int counts[BLOCK];
};

// Sums of R outputs over NV vectors of tokens, in registers.  They begin at zero and are added to those in memory,
// where outputs are TILE apart, after a part of the reduction: a sum of partial sums rounds less than one from end to
// end.
template <int NV, int R> struct Sums {
  Vec s[R][NV] = {};

  void add_to(float* sums) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) *reinterpret_cast<Vec*>(sums + r * TILE + v * LANES) += s[r][v];
  }
  // Adds weight times a row of a tile, at `offset` bytes from `tile`.
  void add(int r, Vec weight, const char* tile, uint64_t offset) {
    const Vec* row = reinterpret_cast<const Vec*>(tile + offset);
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) s[r][v] += weight * row[v];
  }
  // The same for four weights, whose offsets are 16 bits each.
  void add_four(int r, Four weights, const char* tile, uint64_t offsets) {
    add(r, lane<0>(weights), tile, offsets & 0xffff);
    add(r, lane<1>(weights), tile, offsets >> 16 & 0xffff);
    add(r, lane<2>(weights), tile, offsets >> 32 & 0xffff);
    add(r, lane<3>(weights), tile, offsets >> 48);
  }
};

// sums [R][NV vectors] += list of each of R outputs, over `count` entries from `first` on.
template <int NV, int R>
inline void add_entries(float* sums, const float* weights, const uint16_t* offsets, int first, int count,
                        const char* tile) {
  Sums<NV, R> in_flight;
  int e = first;
  // Loads are what limits this loop, so four weights and four offsets come with one load each.
  for (; e + 4 <= first + count; e += 4)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      uint64_t four;
      std::memcpy(&four, offsets + r * CHUNK + e, sizeof four);
      in_flight.add_four(r, load_four(weights + r * CHUNK + e), tile, four);
    }
  for (; e < first + count; e++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) in_flight.add(r, broadcast(weights[r * CHUNK + e]), tile, offsets[r * CHUNK + e]);
  in_flight.add_to(sums);
}

// One tile: sums [block][TILE] += the lists.  NV vectors of each tile row hold tokens.  `next` is the tile that will be
// asked for then: it is brought near meanwhile.
template <int NV>
void add_lists(float* sums, const Lists& lists, int64_t block, const char* tile, const char* next) {
  const int64_t share = CHUNK * TILE * int64_t(sizeof(float)) / block;
  constexpr int R = NV * 2 <= VECTORS ? std::min(4, VECTORS / NV) : ROWS;  // enough sums in flight
  int64_t o = 0;
  for (; o + R <= block; o += R) {
    for (int64_t i = o * share; i < (o + R) * share; i += 64) __builtin_prefetch(next + i, 0, 2);
    int common = lists.counts[o];
    for (int r = 1; r < R; r++) common = std::min(common, lists.counts[o + r]);
    add_entries<NV, R>(sums + o * TILE, lists.weights + o * CHUNK, lists.offsets + o * CHUNK, 0, common, tile);
    if constexpr (R > 1)
      for (int r = 0; r < R; r++)
        if (lists.counts[o + r] > common)
          add_entries<NV, 1>(sums + (o + r) * TILE, lists.weights + (o + r) * CHUNK, lists.offsets + (o + r) * CHUNK,
                             common, lists.counts[o + r] - common, tile);
  }
  for (; o < block; o++)
    add_entries<NV, 1>(sums + o * TILE, lists.weights + o * CHUNK, lists.offsets + o * CHUNK, 0, lists.counts[o], tile);
}

inline void add_lists(int vectors, float* sums, const Lists& lists, int64_t block, const char* tile, const char* next) {
  switch (vectors) {
    case 1: return add_lists<1>(sums, lists, block, tile, next);
    case 2: return add_lists<2>(sums, lists, block, tile, next);
    case 3: return add_lists<3>(sums, lists, block, tile, next);
    case 4: return add_lists<4>(sums, lists, block, tile, next);
#if !defined(__AVX512F__)
    case 5: return add_lists<5>(sums, lists, block, tile, next);
    case 6: return add_lists<6>(sums, lists, block, tile, next);
    case 7: return add_lists<7>(sums, lists, block, tile, next);
    case 8: return add_lists<8>(sums, lists, block, tile, next);
#endif
  }
}

// y[i, o0 + o] = sums[o][i] for i < count, o < block.
template <class T>
inline void store_transposed(T* y, int64_t stride, const float* sums, int64_t o0, int64_t block, int count) {
  for (int i = 0; i < count; i += 8) {
    const int rows = std::min(8, count - i);
    int64_t o = 0;
    for (; o + 8 <= block; o += 8) {
      Vec8 r[8];
      for (int s = 0; s < 8; s++) r[s] = load8(sums + (o + s) * TILE + i);
      transpose8(r);
      for (int s = 0; s < rows; s++) store8(y + (i + s) * stride + o0 + o, r[s]);
    }
    for (; o < block; o++)
      for (int s = 0; s < rows; s++) y[(i + s) * stride + o0 + o] = from_float<T>(sums[o * TILE + i + s]);
  }
}

// The product.  `fill(lists, o0, block, r0, r1)` makes the lists of outputs [o0, o0 + block) for rows [r0, r1) of the
// reduction; `extra` are further columns of A (the low-rank branch), whose weights `extra_weights [outputs, extra]`
// are dense.  Returns 0, or 1 if there is no memory.
template <class T, class Fill>
int product(int threads, Matrix<T> a, int64_t M, int64_t reduction, Matrix<T> extra, const T* extra_weights,
            int64_t extra_size, const T* bias, T* y, int64_t outputs, const Fill& fill) {
  const int64_t depth = reduction + extra_size;
  const int64_t fitting = std::max<int64_t>(TILE, PANEL_FLOATS / std::max<int64_t>(1, depth) / TILE * TILE);
  const int64_t panel_rows = std::min({PANEL, fitting, ceil_div(M, TILE) * TILE});
  float* panel = shared_a.floats(panel_rows * std::max<int64_t>(1, depth));
  if (panel == nullptr) return 1;
  const int64_t size = block_size(outputs, threads, BLOCK, 8), blocks = ceil_div(outputs, size);
  const int64_t strips = ceil_div(depth, CHUNK);
  Failure failed;

  for (int64_t m0 = 0; m0 < M; m0 += panel_rows) {
    const int64_t rows = std::min(panel_rows, M - m0), tiles = ceil_div(rows, TILE);
    parallel(threads, tiles * strips, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t t = i / strips, j0 = i % strips * CHUNK, j1 = std::min(depth, j0 + CHUNK);
        const int count = int(std::min<int64_t>(TILE, rows - t * TILE)), lanes = int(ceil_div(count, LANES) * LANES);
        float* tile = panel + t * depth * TILE;
        const int padded = std::max(8, lanes);
        const int64_t split = std::clamp(reduction, j0, j1);
        pack_transposed(tile + j0 * TILE, TILE, padded, a, m0 + t * TILE, count, j0, split);
        if (split < j1)
          pack_transposed(tile + split * TILE, TILE, padded, extra, m0 + t * TILE, count, split - reduction,
                          j1 - reduction);
      }
    });
    parallel(threads, blocks, [&](int64_t begin, int64_t end) {
      float* memory = own.floats(BLOCK * (panel_rows + CHUNK + CHUNK / 2));
      if (memory == nullptr) {
        failed.note();
        return;
      }
      float* sums = memory + BLOCK * (CHUNK + CHUNK / 2);  // [tiles][size][TILE]
      Lists lists;
      lists.weights = memory;
      lists.offsets = reinterpret_cast<uint16_t*>(memory + BLOCK * CHUNK);
      for (int64_t b = begin; b < end; b++) {
        const int64_t o0 = b * size, block = std::min(size, outputs - o0);
        for (int64_t t = 0; t < tiles; t++)
          for (int64_t o = 0; o < block; o++)
            std::fill_n(sums + (t * size + o) * TILE, TILE, bias != nullptr ? to_float(bias[o0 + o]) : 0.0f);
        auto part = [&](int64_t t, int64_t r0) {
          return reinterpret_cast<const char*>(panel + (t * depth + r0) * TILE);
        };
        auto add_chunk = [&](int64_t r0) {
          for (int64_t t = 0; t < tiles; t++) {
            const int count = int(std::min<int64_t>(TILE, rows - t * TILE));
            const char* next = t + 1 < tiles ? part(t + 1, r0) : part(0, r0 + CHUNK < depth ? r0 + CHUNK : 0);
            add_lists(int(ceil_div(count, LANES)), sums + t * size * TILE, lists, block, part(t, r0), next);
          }
        };
        for (int64_t r0 = 0; r0 < reduction; r0 += CHUNK) {
          fill(lists, o0, block, r0, std::min(reduction, r0 + CHUNK));
          add_chunk(r0);
        }
        for (int64_t r0 = 0; r0 < extra_size; r0 += CHUNK) {
          const int count = int(std::min<int64_t>(CHUNK, extra_size - r0));
          for (int64_t o = 0; o < block; o++) {
            lists.counts[o] = count;
            for (int e = 0; e < count; e++) {
              lists.weights[o * CHUNK + e] = to_float(extra_weights[(o0 + o) * extra_size + r0 + e]);
              lists.offsets[o * CHUNK + e] = uint16_t(e * TILE * sizeof(float));
            }
          }
          add_chunk(reduction + r0);
        }
        for (int64_t t = 0; t < tiles; t++)
          store_transposed(y + (m0 + t * TILE) * outputs, outputs, sums + t * size * TILE, o0, block,
                           int(std::min<int64_t>(TILE, rows - t * TILE)));
      }
    });
    if (failed) return 1;
  }
  return 0;
}

// Asks for `bytes` bytes at p, which need not be readable.
PREFETCHES inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

// Lists of the forward product: row o of W, columns [r0, r1).  Values lie in order; the offsets come from a table.
template <class T> struct ForwardLists {
  const T* values;         // [N, K / 2]
  const uint8_t* pattern;  // [N, ceil(K / 8)]
  int64_t N, K;

  void operator()(Lists& lists, int64_t o0, int64_t block, int64_t r0, int64_t r1) const {
    constexpr uint64_t EACH = 0x0001000100010001;
    const int64_t width = pattern_width(K);
    const int bytes = int((r1 - r0) / 8), rest = int((r1 - r0) / 4 % 2);
    for (int64_t o = 0; o < block; o++) {
      const T* v = values + (o0 + o) * (K / 2) + r0 / 2;
      const uint8_t* p = pattern + (o0 + o) * width + r0 / 8;
      float* w = lists.weights + o * CHUNK;
      uint16_t* to = lists.offsets + o * CHUNK;
      // What the next chunk, or the first one of the next block, will read: rows are far apart, no hardware sees it.
      if (r1 < K) {
        prefetch(v + CHUNK / 2, CHUNK / 2 * sizeof(T));
        if (r1 / 8 % 64 == 0) prefetch(p + CHUNK / 8, 64);
      } else if (o0 + block + o < N) {
        prefetch(values + (o0 + block + o) * (K / 2), CHUNK / 2 * sizeof(T));
        prefetch(pattern + (o0 + block + o) * width, 64);
      }
      for (int j = 0; j < bytes; j++) {
        const Vec4 four = load_values(v + 4 * j);
        *reinterpret_cast<AnyVec4*>(w + 4 * j) = four;
        const uint64_t words = (tables.kept_words[p[j]] + 8 * j * EACH) * (TILE * sizeof(float));
        std::memcpy(to + 4 * j, &words, sizeof words);
      }
      for (int e = 0; e < 2 * rest; e++) {
        w[4 * bytes + e] = to_float(v[4 * bytes + e]);
        to[4 * bytes + e] = uint16_t((8 * bytes + tables.kept[p[bytes] & 15][e]) * TILE * sizeof(float));
      }
      lists.counts[o] = 4 * bytes + 2 * rest;
    }
  }
};

// Lists of the input gradient: column o of W, rows [r0, r1).  With a column mask only the entries that it keeps too
// count: W^{R,C}, double-pruned.
template <class T> struct ColumnLists {
  const T* values;
  const uint8_t* pattern;
  const uint8_t* column_mask;  // or nullptr: exact
  int64_t N, K;

  void operator()(Lists& lists, int64_t o0, int64_t block, int64_t r0, int64_t r1) const {
    static_assert(CHUNK == 64 && BLOCK == 64);
    const int64_t width = pattern_width(K);
    const int bytes = int(ceil_div(block, 8)), rows = int(r1 - r0);
    // Bits of the mask from value o0 / 2 on, which may lie in the middle of a byte.
    const int shift = int(o0 / 2 % 8), mask_bytes = int(ceil_div(shift + block / 2, 8));
    uint64_t kept[64] = {};
    alignas(64) float dense[64][64];
    for (int n = 0; n < rows; n++) {
      const uint8_t* p = pattern + (r0 + n) * width + o0 / 8;
      const T* v = values + (r0 + n) * (K / 2) + o0 / 2;
      if (r1 + n < N) {
        prefetch(v + CHUNK * (K / 2), BLOCK / 2 * sizeof(T));
        prefetch(p + CHUNK * width, 8);
      }
      kept[n] = eight(p, bytes);
      if (column_mask != nullptr) {
        const uint8_t* also = column_mask + (r0 + n) * mask_width(K) + o0 / 16;
        if (r1 + n < N) prefetch(also + CHUNK * mask_width(K), 4);
        kept[n] = kept_by_both(kept[n], uint32_t(eight(also, mask_bytes) >> shift));
      }
#if defined(__AVX512F__)
      if (o0 + BLOCK <= K) {
        for (int c = 0; c < BLOCK; c += 16)
          _mm512_store_ps(&dense[n][c], (__m512)expand_step(v + c / 2, p + c / 8));
        continue;
      }
#endif
      for (int j = 0; j < bytes; j++) {
        const bool whole = o0 + 8 * j + 8 <= K;
        store8(&dense[n][8 * j], whole ? expand_from(v + 4 * j, p[j]) : expand8(load_values(v + 4 * j, 2), p[j]));
      }
    }
    transpose_bits(kept);
    for (int64_t o = 0; o < block; o += WIDTH)
      collect(lists, &dense[0][o], kept + o, o, std::min(WIDTH, block - o), rows);
  }

 private:
  // Columns that are collected at a time, from as many rows.
#if defined(__AVX512F__)
  static constexpr int64_t WIDTH = 16;
#else
  static constexpr int64_t WIDTH = 8;
#endif

  // Up to eight bytes, as a number.
  static uint64_t eight(const uint8_t* p, int bytes) {
    uint64_t number = 0;
    if (bytes == 8)
      std::memcpy(&number, p, 8);
    else
      std::memcpy(&number, p, bytes);
    return number;
  }

  // Lists of outputs [o, o + outputs): the kept of columns dense [rows][64].  WIDTH entries are written at a time,
  // those of them that are kept count.
  static void collect(Lists& lists, const float* dense, const uint64_t* kept, int64_t o, int64_t outputs, int rows) {
    int counts[WIDTH] = {};
    for (int n = 0; n < rows; n += int(WIDTH)) {
#if defined(__AVX512F__)
      __m512i column[16];
      for (int i = 0; i < 16; i++) column[i] = _mm512_load_si512(dense + (n + i) * 64);
      transpose16(column);
      const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i offsets = _mm512_mullo_epi32(_mm512_add_epi32(numbers, _mm512_set1_epi32(n)),
                                                 _mm512_set1_epi32(TILE * sizeof(float)));
      for (int i = 0; i < outputs; i++) {
        const __mmask16 bits = __mmask16(kept[i] >> n);
        const int64_t at = (o + i) * CHUNK + counts[i];
        _mm512_storeu_si512(lists.weights + at, _mm512_mask_compress_epi32(fresh_zero(), bits, column[i]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(lists.offsets + at),
                            _mm512_cvtepi32_epi16(_mm512_mask_compress_epi32(fresh_zero(), bits, offsets)));
        counts[i] += __builtin_popcount(bits);
      }
#else
      Vec8 column[8];
      for (int i = 0; i < 8; i++) column[i] = load8(dense + (n + i) * 64);
      transpose8(column);
      for (int i = 0; i < outputs; i++) {
        const uint8_t byte = uint8_t(kept[i] >> n);
        const int64_t at = (o + i) * CHUNK + counts[i];
        store8(lists.weights + at, gather8(column[i], byte));
        const Half8 offsets = (set_bits(byte) + uint16_t(n)) * uint16_t(TILE * sizeof(float));
        std::memcpy(lists.offsets + at, &offsets, sizeof offsets);
        counts[i] += __builtin_popcount(byte);
      }
#endif
    }
    for (int i = 0; i < outputs; i++) lists.counts[o + i] = counts[i];
  }
};

}  // namespace slope
