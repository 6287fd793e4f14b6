// What fuzz_cpu.cpp draws and computes with: a stand-in for PyTorch's pool, numbers, memory, matrices and patterns.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace fuzz {

// --- the stand-in for PyTorch's pool ------------------------------------------------------------------------------

inline int workers = 1;
inline bool uneven = false;  // parts of different sizes, as another pool may cut them

inline void run_in_threads(int64_t begin, int64_t end, int64_t, void (*f)(int64_t, int64_t, void*), void* context) {
  if (begin >= end) return;
  std::vector<int64_t> cuts{begin};
  for (int t = 1; t < workers; t++) {
    const double part = double(t) / workers;
    const int64_t cut = begin + int64_t(double(end - begin) * (uneven ? part * part : part));
    if (cut > cuts.back()) cuts.push_back(cut);
  }
  cuts.push_back(end);
  std::vector<std::thread> threads;
  for (size_t i = 1; i + 1 < cuts.size(); i++) threads.emplace_back(f, cuts[i], cuts[i + 1], context);
  f(cuts[0], cuts[1], context);
  for (std::thread& thread : threads) thread.join();
}

// --- numbers --------------------------------------------------------------------------------------------------------

enum Type { FLOAT32, BFLOAT16, FLOAT16 };
constexpr int SIZE[] = {4, 2, 2};
constexpr double ROUNDOFF[] = {0x1p-24, 0x1p-8, 0x1p-11};
constexpr double SMALLEST[] = {0x1p-149, 0x1p-133, 0x1p-24};
constexpr int DIGITS[] = {24, 8, 11};
constexpr int LOWEST[] = {-149, -133, -24};

inline double decode(Type type, const void* p) {
  if (type == FLOAT32) {
    float f;
    std::memcpy(&f, p, 4);
    return f;
  }
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  if (type == BFLOAT16) return std::bit_cast<float>(uint32_t(bits) << 16);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

inline void encode(Type type, double value, void* p) {
  if (type == FLOAT32) {
    const float f = float(value);
    std::memcpy(p, &f, 4);
    return;
  }
  uint16_t bits;
  if (std::isnan(value) || std::isinf(value)) {
    const uint16_t infinity = type == BFLOAT16 ? 0x7f80 : 0x7c00;
    bits = uint16_t(infinity | (std::isnan(value) ? 0x40 : 0) | (std::signbit(value) ? 0x8000 : 0));
  } else {
    int exponent = 0;
    std::frexp(value, &exponent);
    const int last = std::max(exponent - DIGITS[type], LOWEST[type]);
    const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -last)), last);
    if (type == BFLOAT16) {
      bits = uint16_t(std::bit_cast<uint32_t>(float(rounded)) >> 16);
    } else {
      const double a = std::fabs(rounded);
      std::frexp(a, &exponent);
      const uint16_t magnitude = a < 0x1p-14 ? uint16_t(std::ldexp(a, 24))
                                             : uint16_t(((exponent + 13) << 10) + int(std::ldexp(a, 11 - exponent)));
      bits = uint16_t(magnitude | (std::signbit(rounded) ? 0x8000 : 0));
    }
  }
  std::memcpy(p, &bits, 2);
}

struct Random {
  std::mt19937_64 engine;
  int64_t below(int64_t n) { return int64_t(engine() % uint64_t(n)); }
  bool once_in(int64_t n) { return below(n) == 0; }
  double normal() { return std::normal_distribution<double>()(engine); }
};

// --- memory ---------------------------------------------------------------------------------------------------------

inline bool nulls = false;  // whether memory of no bytes is a null pointer

// Exactly so many bytes, filled with 0xff (NaN in every type).
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes, int64_t offset = 0) : size_(bytes), offset_(offset) {
    if (bytes == 0 && nulls) return;
    // Every other one at the start of a cache line, as PyTorch's are: some kernels do otherwise then.
    static uint32_t made = 0;
    void* memory = nullptr;
    if (made++ % 2 == 0)
      memory = std::malloc(size_t(bytes + offset));
    else if (posix_memalign(&memory, 64, size_t(bytes + offset)) != 0)
      memory = nullptr;
    memory_.reset(static_cast<uint8_t*>(memory));
    std::memset(memory_.get(), 0xff, size_t(bytes + offset));
  }
  uint8_t* data() const { return memory_ ? memory_.get() + offset_ : nullptr; }
  int64_t size() const { return size_; }
  Buffer copy() const {
    Buffer other(size_, offset_);
    if (size_ != 0) std::memcpy(other.data(), data(), size_t(size_));
    return other;
  }
  bool operator==(const Buffer& other) const {
    return size_ == other.size_ && (size_ == 0 || std::memcmp(data(), other.data(), size_t(size_)) == 0);
  }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  int64_t size_ = 0, offset_ = 0;
};

// A matrix somewhere in a buffer.
struct Matrix {
  Type type;
  int64_t rows, columns, row_stride, column_stride;
  Buffer buffer;
  uint8_t* at(int64_t i, int64_t j) const { return buffer.data() + (i * row_stride + j * column_stride) * SIZE[type]; }
  std::vector<double> numbers() const {  // [rows, columns]
    std::vector<double> result(size_t(rows * columns));
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < columns; j++) result[size_t(i * columns + j)] = decode(type, at(i, j));
    return result;
  }
};

inline Matrix empty(Type type, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                    int64_t offset = 0) {
  const bool none = rows == 0 || columns == 0;
  const int64_t span = none ? 0 : 1 + (rows - 1) * row_stride + (columns - 1) * column_stride;
  return {type, rows, columns, row_stride, column_stride, Buffer(span * SIZE[type], offset * SIZE[type])};
}

inline Matrix contiguous(Type type, int64_t rows, int64_t columns) { return empty(type, rows, columns, columns, 1); }

inline Matrix laid_out(Random& random, Type type, int64_t rows, int64_t columns, bool special) {
  const int64_t pad = random.below(9);
  const int64_t offset = random.once_in(3) ? 1 + random.below(7) : 0;  // the start of a view: an element's alignment
  Matrix m;
  switch (random.below(8)) {
    case 0: m = empty(type, rows, columns, 1, std::max<int64_t>(1, rows) + pad, offset); break;       // transposed
    case 1: m = empty(type, rows, columns, 2 * columns + pad, 2, offset); break;                      // every second
    case 2: m = empty(type, rows, columns, 0, 1, offset); break;                                      // one row for all
    case 3: m = empty(type, rows, columns, 1, 0, offset); break;                                      // one column
    case 4: m = empty(type, rows, columns, 0, 0, offset); break;                                      // one number
    case 5: m = empty(type, rows, columns, columns + pad, 1, offset); break;                          // padded
    default: m = empty(type, rows, columns, columns, 1, offset);
  }
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) encode(type, random.normal(), m.at(i, j));
  if (special && rows != 0 && columns != 0)
    encode(type, random.once_in(2) ? INFINITY : NAN, m.at(random.below(rows), random.below(columns)));
  return m;
}

struct Pattern {
  int64_t N, K, width;
  Buffer buffer;
  bool kept(int64_t n, int64_t k) const { return buffer.data()[n * width + k / 8] >> (k % 8) & 1; }
};

// kind: 0 all six choices alike, 1 one choice for all (lists of very different lengths), 2 by column
inline Pattern draw_pattern(Random& random, int64_t N, int64_t K) {
  constexpr uint8_t LEGAL[] = {3, 5, 6, 9, 10, 12};
  Pattern p{N, K, (K + 7) / 8, Buffer(N * ((K + 7) / 8))};
  const int64_t kind = random.below(4), choice = random.below(6);
  for (int64_t i = 0; i < N * p.width; i++) p.buffer.data()[i] = 0;
  for (int64_t n = 0; n < N; n++)
    for (int64_t g = 0; g < K / 4; g++) {
      const uint8_t nibble = LEGAL[kind == 1 ? choice : kind == 2 ? (choice + g) % 6 : random.below(6)];
      p.buffer.data()[n * p.width + g / 2] |= uint8_t(nibble << (4 * (g % 2)));
    }
  return p;
}

// --- what should come out -------------------------------------------------------------------------------------------

struct Expected {
  double sum = 0;       // over the kept entries
  double scale = 0;     // of their magnitudes
  bool dense_finite = true;  // whether the pruned ones, which a dense product multiplies by zero, leave it finite too
  int64_t terms = 0;
  void add(double a, double b, bool kept = true) {  // b is a weight where some are pruned
    dense_finite &= std::isfinite(a) && (!kept || std::isfinite(b));
    if (!kept) return;
    sum += a * b;
    scale += std::fabs(a * b);
    terms++;
  }
};

struct Failure {
  std::string what;
};

inline void require(bool right, const std::string& what) {
  if (!right) throw Failure{what};
}

inline void check(const char* name, Type type, double got, const Expected& expected, int64_t i, int64_t j) {
  const std::string where = std::string(name) + " [" + std::to_string(i) + ", " + std::to_string(j) + "] is " +
                            std::to_string(got) + ", expected " + std::to_string(expected.sum);
  if (!std::isfinite(expected.sum)) return require(!std::isfinite(got), where + ": an infinity or NaN got lost");
  if (!expected.dense_finite) return;  // multiplied by an explicit zero it may be a NaN, or left out
  const double added = 2.0 * double(expected.terms + 1) * ROUNDOFF[FLOAT32] * expected.scale;
  const double rounded = 1.01 * ROUNDOFF[type] * (std::fabs(expected.sum) + added) + SMALLEST[type];
  require(std::fabs(got - expected.sum) <= added + rounded, where);
}

}  // namespace fuzz
