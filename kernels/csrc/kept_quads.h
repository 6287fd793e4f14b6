// The weight gradient for tens of tokens with AVX2, where kept_lanes.h is not there: packing X for weight_gradient.h
// would not pay off.
//
// Lanes are eight rows of W.  Each keeps two of four neighbouring columns; where, is the same for all tokens, so that
// two index vectors serve a whole sum:
//
//   sums [row] += dY[m, row] * permute(X[m, four columns], index [row])
//
// for the first kept column of every row, and for the second.  The permutation is one of bytes within 128 bits: unlike
// vpermps it takes one operation, and unlike vpermilps it does not take the place of a multiplication (both on Zen 3).
// A strip of 16 columns has eight such sums.
//
//   grads    dY [ceil(N / 8)][M][8]        shared by the threads, zeros past N
//   inputs   X  [ceil(K / 16)][M][16]      likewise, zeros past K
#pragma once

#include "product.h"

#if defined(__AVX2__) && !defined(__AVX512F__)

namespace slope {

constexpr int64_t QUADS = 128;            // tokens up to which this is used
constexpr int64_t STRIPS_AT_A_TIME = 16;  // of inputs: they stay in L2 while rows pass
static_assert(STRIPS_AT_A_TIME % 2 == 0);

// to [M][width] = a[0 .. M, j0 .. j0 + width), zeros from column `columns` of a on; width is 8 or 16.
template <class T>
inline void pack_panel(float* to, Matrix<T> a, int64_t M, int64_t j0, int64_t width, int64_t columns) {
  const int64_t there = std::min(width, columns - j0);
  for (int64_t m = 0; m < M; m++, to += width) {
    if (there == width && a.columns == 1)
      for (int64_t j = 0; j < width; j += 8) store8(to + j, load8(a.at(m, j0 + j)));
    else
      for (int64_t j = 0; j < width; j++) to[j] = j < there ? to_float(*a.at(m, j0 + j)) : 0.0f;
  }
}

// index[2 q] and index[2 q + 1]: the bytes where eight rows, of which lanes have the bits of 16 columns, keep the first
// and the second of the four columns of group q.
inline void quad_indices(__m256i (&index)[8], __m256i rows) {
  const __m256i first = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 4, 0, 8, 0, 4, 0, 12, 0, 4, 0, 8, 0, 4, 0));
  const __m256i second = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 0, 4, 0, 8, 8, 4, 0, 12, 12, 4, 12, 8, 8, 4));
  const __m256i each = _mm256_set1_epi32(0x03020100), low = _mm256_set1_epi8(15);
  const __m256i lanes = _mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C));
  for (int half = 0; half < 2; half++) {
    // A byte of each lane has the bits of two groups; it goes to all four bytes.
    const __m256i bits = _mm256_shuffle_epi8(rows, _mm256_add_epi8(lanes, _mm256_set1_epi8(char(half))));
    for (int q = 2 * half; q < 2 * half + 2; q++) {
      const __m256i nibbles = _mm256_and_si256(q % 2 == 0 ? bits : _mm256_srli_epi32(bits, 4), low);
      index[2 * q] = _mm256_add_epi8(_mm256_shuffle_epi8(first, nibbles), each);
      index[2 * q + 1] = _mm256_add_epi8(_mm256_shuffle_epi8(second, nibbles), each);
    }
  }
}

// sums [8 kept of a strip][8 rows] of M tokens: grads [M][8], inputs [M][16].
inline void quad_sums(Vec8 (&sums)[8], const float* grads, const float* inputs, const __m256i (&index)[8], int64_t M) {
  Vec8 s[8] = {};
  for (int64_t m = 0; m < M; m++) {
    const Vec8 grad = load8(grads + 8 * m);
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) {
      const __m256i four = (__m256i)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(inputs + 16 * m + 4 * q));
      s[2 * q] += (Vec8)_mm256_shuffle_epi8(four, index[2 * q]) * grad;
      s[2 * q + 1] += (Vec8)_mm256_shuffle_epi8(four, index[2 * q + 1]) * grad;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) sums[i] = s[i];
}

// Metadata of 32 columns from k on for the eight rows from n on, a lane each; zeros past N and K.
inline __m256i rows_of_bits(const uint8_t* pattern, int64_t n, int64_t k, int64_t N, int64_t K) {
  const int64_t width = pattern_width(K), bytes = std::min<int64_t>(4, width - k / 8);
  const uint8_t* p = pattern + n * width + k / 8;
  alignas(32) uint32_t bits[8] = {};
  if (n + 8 <= N && bytes == 4)
    for (int64_t r = 0; r < 8; r++) std::memcpy(&bits[r], p + r * width, 4);
  else
    for (int64_t r = 0; r < std::min<int64_t>(8, N - n); r++) std::memcpy(&bits[r], p + r * width, bytes);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(bits));
}

// dV [N, K / 2] = dY^T X at the kept positions, or += with `accumulate`.  Threads share out rows.
template <class T>
int grad_weight_quads(int threads, Matrix<T> grad, Matrix<T> x, const uint8_t* pattern, T* dv, bool accumulate,
                      int64_t M, int64_t N, int64_t K) {
  const int64_t blocks = ceil_div(N, 8), strips = ceil_div(K, 16);
  float* grads = shared_a.floats(blocks * M * 8);
  float* inputs = shared_b.floats(strips * M * 16);
  if (grads == nullptr || inputs == nullptr) return 1;
  parallel(threads, blocks, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) pack_panel(grads + b * M * 8, grad, M, 8 * b, 8, N);
  });
  parallel(threads, strips, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++) pack_panel(inputs + s * M * 16, x, M, 16 * s, 16, K);
  });
  parallel(threads, blocks, [&](int64_t begin, int64_t end) {
    __m256i index[8];
    Vec8 sums[8];
    for (int64_t s0 = 0; s0 < strips; s0 += STRIPS_AT_A_TIME)
      for (int64_t b = begin; b < end; b++) {
        const int64_t rows = std::min<int64_t>(8, N - 8 * b);
        __m256i bits{};
        for (int64_t s = s0; s < std::min(strips, s0 + STRIPS_AT_A_TIME); s++) {
          bits = s % 2 == 0 ? rows_of_bits(pattern, 8 * b, 16 * s, N, K) : _mm256_srli_epi32(bits, 16);
          quad_indices(index, bits);
          quad_sums(sums, grads + b * M * 8, inputs + s * M * 16, index, M);
          transpose8(sums);  // [8 rows][8 kept]
          T* to = dv + 8 * b * (K / 2) + 8 * s;
          const int64_t count = std::min<int64_t>(8, K / 2 - 8 * s);
          for (int64_t r = 0; r < rows; r++, to += K / 2)
            if (count == 8)
              store8(to, accumulate ? load8(to) + sums[r] : sums[r]);
            else
              for (int64_t i = 0; i < count; i++)
                to[i] = from_float<T>(accumulate ? to_float(to[i]) + sums[r][i] : sums[r][i]);
        }
      }
  });
  return 0;
}

}  // namespace slope

#endif
