// Calls of the kernels whose threads get no memory.  Linked with -Wl,--wrap=aligned_alloc; run under ThreadSanitizer.
#include <cstdio>

#include "cpu_abi.h"
#include "fuzz_cpu.h"

extern "C" {
void* __real_aligned_alloc(size_t alignment, size_t size);

// Only the calling thread has memory: the others meet their first allocation in every call.
static const std::thread::id caller = std::this_thread::get_id();
void* __wrap_aligned_alloc(size_t alignment, size_t size) {
  return std::this_thread::get_id() == caller ? __real_aligned_alloc(alignment, size) : nullptr;
}
}

int main() {
  constexpr int THREADS = 4;
  constexpr int64_t N = 512, K = 512;
  fuzz::workers = THREADS;
  slope_cpu_set_parallel(reinterpret_cast<void*>(&fuzz::run_in_threads));
  for (const int64_t M : {int64_t(50), int64_t(300)}) {
    const std::vector<uint8_t> pattern(N * K / 8, 0x33), mask(N * K / 16, 0xff);
    std::vector<float> x(M * K), grad(M * N), values(N * K / 2), y(M * N), dx(M * K), dv(N * K / 2);
    for (int dtype = 0; dtype < 3; dtype++) {
      const int status[] = {
          slope_cpu_forward(dtype, THREADS, x.data(), K, 1, values.data(), pattern.data(), nullptr, nullptr, nullptr, 0,
                            y.data(), M, N, K),
          slope_cpu_grad_input(dtype, THREADS, grad.data(), N, 1, values.data(), pattern.data(), nullptr, dx.data(), M,
                               N, K),
          slope_cpu_grad_input(dtype, THREADS, grad.data(), N, 1, values.data(), pattern.data(), mask.data(), dx.data(),
                               M, N, K),
          slope_cpu_grad_weight(dtype, THREADS, grad.data(), N, 1, x.data(), K, 1, pattern.data(), dv.data(), 0, M, N,
                                K)};
      std::printf("dtype %d, M %d: %d %d %d %d\n", dtype, int(M), status[0], status[1], status[2], status[3]);
    }
  }
}
