// Bit c of row n -> bit n of row c, for 64 x 64 bits: how masks of columns become masks of rows.
#pragma once

#include "vector.h"

namespace slope {

#if defined(__AVX512BW__)
inline void transpose_bits(uint64_t (&rows)[64]) {
  // Bytes of two rows interleaved, then words of four pairs: the j-th quarter of z[i], of 64 bits, is the j-th byte of
  // rows 8 i to 8 i + 7.
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
  alignas(64) static constexpr uint16_t WORDS[32] = {0, 8,  16, 24, 1, 9,  17, 25, 2, 10, 18, 26, 3, 11, 19, 27,
                                                     4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31};
  const __m512i words = _mm512_load_si512(WORDS);
  __m512i z[8], t[8];
  for (int i = 0; i < 8; i++)
    z[i] = _mm512_permutexvar_epi16(words, _mm512_shuffle_epi8(_mm512_loadu_si512(rows + 8 * i), bytes));
  // z[j] becomes the j-th byte of all 64 rows.
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_epi64(z[i], z[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi64(z[i], z[i + 1]);
  }
  for (int odd = 0; odd < 2; odd++) {
    const __m512i a = _mm512_shuffle_i64x2(t[odd], t[2 + odd], 0x44);
    const __m512i b = _mm512_shuffle_i64x2(t[odd], t[2 + odd], 0xee);
    const __m512i c = _mm512_shuffle_i64x2(t[4 + odd], t[6 + odd], 0x44);
    const __m512i d = _mm512_shuffle_i64x2(t[4 + odd], t[6 + odd], 0xee);
    z[odd] = _mm512_shuffle_i64x2(a, c, 0x88);
    z[2 + odd] = _mm512_shuffle_i64x2(a, c, 0xdd);
    z[4 + odd] = _mm512_shuffle_i64x2(b, d, 0x88);
    z[6 + odd] = _mm512_shuffle_i64x2(b, d, 0xdd);
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++)
#pragma GCC unroll 8
    for (int bit = 7; bit >= 0; bit--) {  // the sign bit of every byte, then the next one
      rows[8 * j + bit] = _mm512_movepi8_mask(z[j]);
      z[j] = _mm512_add_epi8(z[j], z[j]);
    }
}
#else
// Warren, Hacker's Delight, section 7-3, widened.
template <int STEP> inline void swap_blocks(uint64_t (&rows)[64], uint64_t mask) {
  for (int base = 0; base < 64; base += 2 * STEP)
#pragma GCC unroll 32
    for (int k = base; k < base + STEP; k++) {
      const uint64_t swap = ((rows[k] >> STEP) ^ rows[k + STEP]) & mask;
      rows[k] ^= swap << STEP;
      rows[k + STEP] ^= swap;
    }
}

inline void transpose_bits(uint64_t (&rows)[64]) {
  swap_blocks<32>(rows, 0x00000000ffffffff);
  swap_blocks<16>(rows, 0x0000ffff0000ffff);
  swap_blocks<8>(rows, 0x00ff00ff00ff00ff);
  swap_blocks<4>(rows, 0x0f0f0f0f0f0f0f0f);
  swap_blocks<2>(rows, 0x3333333333333333);
  swap_blocks<1>(rows, 0x5555555555555555);
}
#endif

}  // namespace slope
