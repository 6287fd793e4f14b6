// Threads and scratch memory.
//
// Work is split by output only, never along a sum, so that results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace slope {

// torch_parallel_for: PyTorch's own pool, exported by libtorch_cpu with C linkage.  It obeys torch.set_num_threads.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void*);
inline ParallelFor parallel_for = nullptr;

// Calls body(begin, end) on parts of [0, count).  The body must not throw: it crosses C.
template <class Body> void parallel(int threads, int64_t count, const Body& body) {
  if (count <= 0) return;
  if (threads <= 1 || count == 1 || parallel_for == nullptr) {
    body(int64_t(0), count);
    return;
  }
  parallel_for(0, count, 1, [](int64_t begin, int64_t end, void* b) { (*static_cast<const Body*>(b))(begin, end); },
               const_cast<void*>(static_cast<const void*>(&body)));
}

// Whether some thread of a call had no memory.  Read after parallel() has returned, which waits for all threads.
class Failure {
 public:
  void note() { failed_.store(true, std::memory_order_relaxed); }
  explicit operator bool() const { return failed_.load(std::memory_order_relaxed); }

 private:
  std::atomic<bool> failed_ = false;
};

// Memory that is kept from call to call and grows only: a fresh allocation of megabytes would fault page by page.
class Scratch {
 public:
  ~Scratch() { std::free(base_); }

  // `count` floats, aligned to 64 bytes, uninitialised; nullptr if there is no memory.
  float* floats(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(float) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(base_);
      base_ = std::aligned_alloc(64, bytes);
      size_ = base_ != nullptr ? bytes : 0;
    }
    return static_cast<float*>(base_);
  }

 private:
  void* base_ = nullptr;
  size_t size_ = 0;
};

// The caller's (shared with the workers of its call) and each worker's own.
inline thread_local Scratch shared_a, shared_b, shared_c, own;

// For functions that only prefetch: GCC sees no effect in them, and drops the calls that it has not inlined by then.
#define PREFETCHES __attribute__((always_inline))

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Size of the blocks into which `count` outputs are cut: at most `largest`, a multiple of `multiple`, and as many
// for every thread.
inline int64_t block_size(int64_t count, int threads, int64_t largest, int64_t multiple) {
  const int64_t rounds = std::max<int64_t>(1, ceil_div(count, largest * threads));
  const int64_t size = ceil_div(ceil_div(count, rounds * threads), multiple) * multiple;
  return std::min(largest, std::max(multiple, size));
}

}  // namespace slope
