// What one lane of an AVX-512 multiplication takes: one float or, where the CPU multiplies bfloat16, two neighbours of
// the sum in one 32-bit word.
#pragma once

#include <type_traits>

#include "vector.h"

#if defined(__AVX512F__)

namespace slope {

struct FloatWord {
  static constexpr int TERMS = 1;
  static __m512 multiply_add(__m512 sums, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sums);
  }
  template <class T> static uint32_t word(const T* first, const T*) { return bit_cast<uint32_t>(to_float(*first)); }
};

#if defined(__AVX512BF16__)
struct PairWord {
  static constexpr int TERMS = 2;
  static __m512 multiply_add(__m512 sums, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
  }
  static uint32_t word(const BFloat16* first, const BFloat16* second) {
    return first->bits | uint32_t(second != nullptr ? second->bits : 0) << 16;
  }
};
template <class T> using Word = std::conditional_t<std::is_same_v<T, BFloat16>, PairWord, FloatWord>;
#else
template <class T> using Word = FloatWord;
#endif

}  // namespace slope

#endif
