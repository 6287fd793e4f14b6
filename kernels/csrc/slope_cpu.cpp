// 2:4 kernels for CPUs behind a plain C interface: no PyTorch headers, so that it compiles in seconds.
//
// Letters: M tokens, N out_features, K in_features.  W [N, K] is 2:4 along K and stored as values [N, K / 2] and
// pattern uint8 [N, ceil(K / 8)]; W^{R,C} has a column mask uint8 [N, ceil(K / 16)] in addition (pattern.h).  Sizes and
// strides are in elements.  dtype is 0 for float32, 1 for bfloat16 and 2 for float16; every product adds up in float32.
// Each function returns 0, 1 if there is no memory, or 2 for an unknown dtype.  The metadata should be legal
// (slope_cpu_illegal_groups): with any other bytes the results mean nothing, but nothing out of bounds is read or
// written.
#include <bit>
#include <type_traits>

#include "columns.h"
#include "gemv.h"
#include "product.h"
#include "several.h"
#include "few_backward.h"
#include "few_pairs.h"
#include "kept_lanes.h"
#include "kept_quads.h"
#include "pairs.h"
#include "weight_gradient.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

static_assert(std::endian::native == std::endian::little, "metadata is read in words");

namespace {

using namespace slope;

// Calls f with a null pointer of the element type.
template <class F> int with_type(int dtype, const F& f) {
  switch (dtype) {
    case 0: return f(static_cast<float*>(nullptr));
    case 1: return f(static_cast<BFloat16*>(nullptr));
    case 2: return f(static_cast<Float16*>(nullptr));
    default: return 2;
  }
}

// The same for operations that only move bits.
template <class F> int with_bits(int dtype, const F& f) {
  switch (dtype) {
    case 0: f(static_cast<uint32_t*>(nullptr)); return 0;
    case 1:
    case 2: f(static_cast<uint16_t*>(nullptr)); return 0;
    default: return 2;
  }
}

}  // namespace

EXPORT int slope_cpu_abi(void) { return 3; }

EXPORT const char* slope_cpu_isa(void) {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
  return "avx512_bf16";
#elif defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "portable";
#endif
}

// Whether this CPU, under this operating system, runs what this library was compiled for.
EXPORT
#if defined(__x86_64__)
__attribute__((target("arch=x86-64")))
#endif
int slope_cpu_supported(void) {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
  return __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq");
#elif defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

EXPORT void slope_cpu_set_parallel(void* torch_parallel_for) {
  parallel_for = reinterpret_cast<ParallelFor>(torch_parallel_for);
}

// Y [M, N] = X W^T + bias + down up^T.  x: any strides; bias [N] or null; down [M, R] and up [N, R] or R = 0.
EXPORT int slope_cpu_forward(int dtype, int threads, const void* x, int64_t x_stride_m, int64_t x_stride_k,
                             const void* values, const uint8_t* pattern, const void* bias, const void* down,
                             const void* up, int64_t R, void* y, int64_t M, int64_t N, int64_t K) {
  if (M == 0 || N == 0) return 0;
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Matrix<T> a{static_cast<const T*>(x), x_stride_m, x_stride_k};
    const T* v = static_cast<const T*>(values);
    const T* b = static_cast<const T*>(bias);
    const T* d = static_cast<const T*>(down);
    const T* u = static_cast<const T*>(up);
    if (M <= few<T>()) return forward_few(threads, a, v, pattern, b, d, u, R, static_cast<T*>(y), M, N, K);
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
    if constexpr (std::is_same_v<T, BFloat16>)
      return pair_product(threads, a, M, K, Matrix<T>{d, R, 1}, u, R, b, static_cast<T*>(y),
                          N, ForwardSlots{v, pattern, N, K});
    else
#endif
    if (M <= SEVERAL)
      return forward_several(threads, a, v, pattern, b, Matrix<T>{d, R, 1}, u, R, static_cast<T*>(y), M, N, K);
    else
      return product(threads, a, M, K, Matrix<T>{d, R, 1}, u, R, b, static_cast<T*>(y), N,
                     ForwardLists<T>{v, pattern, N, K});
  });
}

// dX [M, K] = dY W; with a column mask, which may be null, dY W^{R,C}.
EXPORT int slope_cpu_grad_input(int dtype, int threads, const void* grad, int64_t g_stride_m, int64_t g_stride_n,
                                const void* values, const uint8_t* pattern, const uint8_t* column_mask, void* dx,
                                int64_t M, int64_t N, int64_t K) {
  if (M == 0 || K == 0) return 0;
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Matrix<T> a{static_cast<const T*>(grad), g_stride_m, g_stride_n};
    const T* v = static_cast<const T*>(values);
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
    if constexpr (std::is_same_v<T, BFloat16>) {
      T* to = static_cast<T*>(dx);
      if (M <= (column_mask != nullptr ? FEW_PAIR_COLUMNS : FEW_PAIR_GRADIENTS))
        return grad_input_pairs(threads, a, v, pattern, column_mask, to, M, N, K);
      if (column_mask != nullptr && M <= GROUPED)
        return pair_product(threads, a, M, N, to, K, GroupSlots{v, pattern, column_mask, N, K});
      return pair_product(threads, a, M, N, to, K, ColumnSlots{v, pattern, column_mask, N, K});
    } else
#endif
    return M <= FEW_GRADIENTS
        ? grad_input_few(threads, a, v, pattern, column_mask, static_cast<T*>(dx), M, N, K)
        : product(threads, a, M, N, Matrix<T>{}, static_cast<const T*>(nullptr), 0, static_cast<const T*>(nullptr),
                   static_cast<T*>(dx), K, ColumnLists<T>{v, pattern, column_mask, N, K});
  });
}

// dV [N, K / 2] = dY^T X at the kept positions, or += with `accumulate`.
EXPORT int slope_cpu_grad_weight(int dtype, int threads, const void* grad, int64_t g_stride_m, int64_t g_stride_n,
                                 const void* x, int64_t x_stride_m, int64_t x_stride_k, const uint8_t* pattern,
                                 void* dv, int accumulate, int64_t M, int64_t N, int64_t K) {
  if (N == 0 || K == 0) return 0;
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Matrix<T> g{static_cast<const T*>(grad), g_stride_m, g_stride_n};
    const Matrix<T> a{static_cast<const T*>(x), x_stride_m, x_stride_k};
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
    if constexpr (std::is_same_v<T, BFloat16>)
      if (0 < M && M <= FEW_PAIR_OUTER)
        return grad_weight_pairs(threads, g, a, pattern, static_cast<T*>(dv), accumulate != 0, M, N, K);
#endif
    if (0 < M && M <= FEW_OUTER)
      return grad_weight_few(threads, g, a, pattern, static_cast<T*>(dv), accumulate != 0, M, N, K);
#if defined(__AVX512F__)
    return grad_weight_lanes(threads, g, a, pattern, static_cast<T*>(dv), accumulate != 0, M, N, K);
#else
#if defined(__AVX2__)
    if (0 < M && M <= QUADS)
      return grad_weight_quads(threads, g, a, pattern, static_cast<T*>(dv), accumulate != 0, M, N, K);
#endif
    return grad_weight(threads, g, a, pattern, static_cast<T*>(dv), accumulate != 0, M, N, K);
#endif
  });
}

// values [N, K / 2] of a dense [N, K] with any strides.
EXPORT int slope_cpu_compress(int dtype, int threads, const void* dense, int64_t stride_n, int64_t stride_k,
                              const uint8_t* pattern, void* values, int64_t N, int64_t K) {
  return with_bits(dtype, [&](auto* type) {
    using U = std::remove_pointer_t<decltype(type)>;
    compress(threads, static_cast<const U*>(dense), stride_n, stride_k, pattern, static_cast<U*>(values), N, K);
  });
}

// dense [N, K] of values [N, K / 2]; with a column mask, which may be null, W^{R,C}.
EXPORT int slope_cpu_expand(int dtype, int threads, const void* values, const uint8_t* pattern,
                            const uint8_t* column_mask, void* dense, int64_t N, int64_t K) {
  return with_bits(dtype, [&](auto* type) {
    using U = std::remove_pointer_t<decltype(type)>;
    expand(threads, static_cast<const U*>(values), pattern, column_mask, static_cast<U*>(dense), N, K);
  });
}

// The second pruning by magnitude: column_mask uint8 [N, ceil(K / 16)].
EXPORT int slope_cpu_pick_columns(int dtype, int threads, const void* values, const uint8_t* pattern,
                                  uint8_t* column_mask, int64_t N, int64_t K) {
  return with_bits(dtype, [&](auto* type) {
    using U = std::remove_pointer_t<decltype(type)>;
    pick_columns(threads, static_cast<const U*>(values), pattern, column_mask, N, K);
  });
}

// (W^{R,C})^T: column_values [K, N / 2], column_pattern uint8 [K, ceil(N / 8)], of what a column mask keeps, which may
// be null, or else picked by magnitude.
EXPORT int slope_cpu_compress_columns(int dtype, int threads, const void* values, const uint8_t* pattern,
                                      const uint8_t* column_mask, void* column_values, uint8_t* column_pattern,
                                      int64_t N, int64_t K) {
  return with_bits(dtype, [&](auto* type) {
    using U = std::remove_pointer_t<decltype(type)>;
    compress_columns(threads, static_cast<const U*>(values), pattern, column_mask, static_cast<U*>(column_values),
                     column_pattern, N, K);
  });
}

EXPORT int64_t slope_cpu_illegal_groups(const uint8_t* pattern, int64_t N, int64_t K) {
  return illegal_groups(pattern, N, K);
}
