// Stores past the cache, for results that are written once and not read again soon: otherwise each line of them would
// be read from memory only to be overwritten.
#pragma once

#include "vector.h"

#if defined(__AVX512F__)

namespace slope {

// Whether rows of so many bytes consist of whole cache lines, as such stores need.
inline bool whole_lines(const void* rows, size_t bytes) {
  return reinterpret_cast<uintptr_t>(rows) % 64 == 0 && bytes % 64 == 0;
}

inline void stream_lines(void* to, const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes / 64; i++)
    _mm512_stream_si512(static_cast<__m512i*>(to) + i, _mm512_load_si512(static_cast<const __m512i*>(from) + i));
}

// Before other threads are told that the results are there.
inline void end_streaming() { _mm_sfence(); }

}  // namespace slope

#endif
