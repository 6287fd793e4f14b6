// The C ABI of the CPU kernels (kernels/csrc/slope_cpu.cpp), as kernels/cpu_library.py calls it.
#pragma once

#include <cstdint>

extern "C" {
int slope_cpu_abi(void);
const char* slope_cpu_isa(void);
int slope_cpu_supported(void);
void slope_cpu_set_parallel(void* torch_parallel_for);
int slope_cpu_forward(int dtype, int threads, const void* x, int64_t x_stride_m, int64_t x_stride_k, const void* values,
                      const uint8_t* pattern, const void* bias, const void* down, const void* up, int64_t R, void* y,
                      int64_t M, int64_t N, int64_t K);
int slope_cpu_grad_input(int dtype, int threads, const void* grad, int64_t g_stride_m, int64_t g_stride_n,
                         const void* values, const uint8_t* pattern, const uint8_t* column_mask, void* dx, int64_t M,
                         int64_t N, int64_t K);
int slope_cpu_grad_weight(int dtype, int threads, const void* grad, int64_t g_stride_m, int64_t g_stride_n,
                          const void* x, int64_t x_stride_m, int64_t x_stride_k, const uint8_t* pattern, void* dv,
                          int accumulate, int64_t M, int64_t N, int64_t K);
int slope_cpu_compress(int dtype, int threads, const void* dense, int64_t stride_n, int64_t stride_k,
                       const uint8_t* pattern, void* values, int64_t N, int64_t K);
int slope_cpu_expand(int dtype, int threads, const void* values, const uint8_t* pattern, const uint8_t* column_mask,
                     void* dense, int64_t N, int64_t K);
int slope_cpu_pick_columns(int dtype, int threads, const void* values, const uint8_t* pattern, uint8_t* column_mask,
                           int64_t N, int64_t K);
int slope_cpu_compress_columns(int dtype, int threads, const void* values, const uint8_t* pattern,
                               const uint8_t* column_mask, void* column_values, uint8_t* column_pattern, int64_t N,
                               int64_t K);
int64_t slope_cpu_illegal_groups(const uint8_t* pattern, int64_t N, int64_t K);
}
