// SIMD vectors through the compiler's vector extensions (GCC and clang), so that one source serves every machine.
// A level of the ladder differs in LANES only, and in the few places that name an instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace slope {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // SSE2, NEON
#endif

#if defined(__AVX512F__)
// A zero that nothing computes.  Expanding and compressing into a register waits for what it held before, on Zen 4 even
// where the rest is zeroed (_mm512_maskz_expand_ps): merged into this one, nothing has to be waited for.
inline __m512i fresh_zero() {
  __m512i zero;
  __asm__("vpxor %x0, %x0, %x0" : "=x"(zero));
  return zero;
}
#endif

typedef float Vec __attribute__((vector_size(LANES * 4), may_alias));
typedef float Vec8 __attribute__((vector_size(32), may_alias));
typedef float Vec4 __attribute__((vector_size(16), may_alias));
// The same at any address.
typedef float AnyVec __attribute__((vector_size(LANES * 4), may_alias, aligned(4)));
typedef float AnyVec8 __attribute__((vector_size(32), may_alias, aligned(4)));
typedef float AnyVec4 __attribute__((vector_size(16), may_alias, aligned(4)));
typedef uint32_t Int8 __attribute__((vector_size(32)));
typedef uint32_t Int4 __attribute__((vector_size(16)));
typedef uint16_t Half8 __attribute__((vector_size(16)));

// Element types as they lie in memory.  Every product adds up in float.
struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

template <class To, class From> inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinity, NaN
  // As if the exponent were float's, then scaled by 2^112: subnormals come out right by themselves.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f));
#endif
}

template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t((bits >> 16) | 0x40)};  // NaN stays one
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};                 // nearest, ties to even
}
template <> inline Float16 from_float<Float16>(float x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or more: infinity
  if (rest < 0x38800000) {                                   // subnormal: the addition rounds to multiples of 2^-24
    const float magic = 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(rest) + magic) - bit_cast<uint32_t>(magic)))};
  }
  return {uint16_t(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13))};
#endif
}

// Eight consecutive elements as float, and back.
inline Vec8 load8(const float* p) { return *reinterpret_cast<const AnyVec8*>(p); }
inline Vec8 load8(const BFloat16* p) {
  Half8 h;
  std::memcpy(&h, p, sizeof h);
  return bit_cast<Vec8>(__builtin_convertvector(h, Int8) << 16);
}
inline Vec8 load8(const Float16* p) {
#if defined(__F16C__)
  return (Vec8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec8 v;
  for (int i = 0; i < 8; i++) v[i] = to_float(p[i]);
  return v;
#endif
}
inline void store8(float* p, Vec8 v) { *reinterpret_cast<AnyVec8*>(p) = v; }
inline void store8(BFloat16* p, Vec8 v) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  const __m128bh h = _mm256_cvtneps_pbh((__m256)v);  // nearest even; what is below 2^-126 becomes zero
  std::memcpy(p, &h, sizeof h);
#else
  const Int8 bits = bit_cast<Int8>(v);
  const Int8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Int8 nan = (Int8)((bits & 0x7fffffff) > 0x7f800000);
  const Half8 h = __builtin_convertvector((nan & ((bits >> 16) | 0x40)) | (~nan & rounded), Half8);
  std::memcpy(p, &h, sizeof h);
#endif
}
inline void store8(Float16* p, Vec8 v) {
#if defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < 8; i++) p[i] = from_float<Float16>(v[i]);
#endif
}

#if defined(__clang__) || __GNUC__ >= 12
#define SLOPE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SLOPE_SHUFFLE4(a, ...) __builtin_shufflevector(a, a, __VA_ARGS__)
#else
#define SLOPE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Int8{__VA_ARGS__})
#define SLOPE_SHUFFLE4(a, ...) __builtin_shuffle(a, Int4{__VA_ARGS__})
#endif

// 8 x 8 transpose in registers: rows[i][j] -> rows[j][i].
inline void transpose8(Vec8 (&r)[8]) {
  Vec8 s[8], t[8];
  for (int i = 0; i < 8; i += 2) {
    s[i] = SLOPE_SHUFFLE(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    s[i + 1] = SLOPE_SHUFFLE(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      t[i + 2 * j] = SLOPE_SHUFFLE(s[i + j], s[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      t[i + 2 * j + 1] = SLOPE_SHUFFLE(s[i + j], s[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; i++) {
    r[i] = SLOPE_SHUFFLE(t[i], t[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = SLOPE_SHUFFLE(t[i], t[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

#if defined(__AVX512F__)
// 16 x 16 words transposed: rows[i][j] -> rows[j][i].
inline void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  // r[4 q + j] holds, in its four lanes of 128 bits, columns j, 4 + j, 8 + j, 12 + j of rows 4 q to 4 q + 3.
  for (int j = 0; j < 4; j++) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
  for (int j = 0; j < 4; j++) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}
#endif

// Sum of each of eight vectors: out[i] = sum of v[i]'s lanes, always in the same order.
inline Vec8 sums8(const Vec (&v)[8]) {
  Vec8 r[8];
  for (int i = 0; i < 8; i++) {
#if defined(__AVX512F__)
    Vec8 halves[2];
    std::memcpy(halves, &v[i], sizeof halves);
    r[i] = halves[0] + halves[1];
#elif defined(__AVX2__)
    r[i] = v[i];
#else
    r[i] = Vec8{v[i][0], v[i][1], v[i][2], v[i][3], 0, 0, 0, 0};
#endif
  }
  // Three times: two vectors become one that holds sums of pairs of lanes of both.
  for (int i = 0; i < 8; i += 2)
    r[i] = SLOPE_SHUFFLE(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
           SLOPE_SHUFFLE(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  for (int i = 0; i < 8; i += 4)
    r[i] = SLOPE_SHUFFLE(r[i], r[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
           SLOPE_SHUFFLE(r[i], r[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  return SLOPE_SHUFFLE(r[0], r[4], 0, 1, 2, 3, 8, 9, 10, 11) + SLOPE_SHUFFLE(r[0], r[4], 4, 5, 6, 7, 12, 13, 14, 15);
}

// Four floats in a register, of which `lane<i>` broadcasts one: a shuffle in place of a load.
#if defined(__AVX512F__)
typedef Vec Four;
inline Four four_of(Vec4 v) { return (Four)_mm512_broadcast_f32x4((__m128)v); }
inline Four load_four(const float* p) { return (Four)_mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
template <int I> inline Vec lane(Four f) { return (Vec)_mm512_permute_ps((__m512)f, I * 0x55); }
#elif defined(__AVX2__)
typedef Vec Four;
inline Four four_of(Vec4 v) { return (Four)_mm256_set_m128((__m128)v, (__m128)v); }
inline Four load_four(const float* p) { return (Four)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
template <int I> inline Vec lane(Four f) { return (Vec)_mm256_permute_ps((__m256)f, I * 0x55); }
#else
typedef Vec4 Four;
inline Four four_of(Vec4 v) { return v; }
inline Four load_four(const float* p) { return *reinterpret_cast<const AnyVec4*>(p); }
template <int I> inline Vec lane(Four f) { return SLOPE_SHUFFLE4(f, I, I, I, I); }
#endif

inline Vec broadcast(float x) {
#if defined(__AVX512F__)
  return Vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#elif defined(__AVX2__)
  return Vec{x, x, x, x, x, x, x, x};
#else
  return Vec{x, x, x, x};
#endif
}

}  // namespace slope
