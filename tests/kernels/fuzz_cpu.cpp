// Random calls of the C interface of kernels/csrc, checked against plain loops in double.
//
//   fuzz_cpu [--seed S] [--seconds T] [--cases C] [--largest L] [--failures F] [--nulls 1] [--garbage 1]
//
// C cases, or as many as fit into T seconds.  A case is made from its seed (and L) alone: one that fails prints it, and
// `--seed S --cases 1` runs it again; the run ends at the F-th (1).  With --nulls an empty matrix is a null pointer, as
// an empty tensor's is.  With --garbage the metadata are arbitrary bytes: results mean nothing then, but no byte out of
// range may be touched.
//
// Every buffer is an allocation of its own, of exactly the bytes that the strides span, so that AddressSanitizer sees
// one byte out of range; each case runs in fresh threads, so that the kernels' scratch memory starts empty.  With
// ASAN_OPTIONS=max_malloc_fill_size=1073741824:malloc_fill_byte=255 a number that was never written is a NaN.
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "cpu_abi.h"
#include "fuzz_cpu.h"

namespace {

using namespace fuzz;

// --- one case -------------------------------------------------------------------------------------------------------

struct Case {
  Random random;
  Type type;
  int64_t M, N, K;
  bool special;  // infinities or NaNs among activations or weights
  Pattern pattern;
  Matrix values;
  std::vector<double> dense;  // [N, K]
  std::vector<int64_t> slot;  // [N, K]: index into values, -1 if pruned

  Case(uint64_t seed, int64_t largest, bool garbage) : random{std::mt19937_64(seed)} {
    type = Type(random.below(3));
    special = random.once_in(12);
    auto size = [&] {
      switch (random.below(8)) {
        case 0: return random.below(3);
        case 1: return int64_t(0);
        case 2:
        case 3: return 1 + random.below(20);
        case 4: return 64 * (1 + random.below(4)) + random.below(5) - 2;  // about whole blocks
        default: return random.below(largest + 1);
      }
    };
    M = size();
    N = size();
    K = (size() + 3) / 4 * 4;
    if (random.once_in(60)) M = 1000 + random.below(300);  // more than one panel
    if (random.once_in(60)) N = 1000 + random.below(100);
    if (random.once_in(60)) K = (random.once_in(2) ? 480 : 1000) + 4 * random.below(40);
    while (M * N * K > int64_t(2) << 20) (M > N ? M : N) /= 2;
    pattern = draw_pattern(random, N, K);
    values = empty(type, N, K / 2, K / 2, 1, random.once_in(3) ? 1 + random.below(7) : 0);  // may be a part of a tensor
    const int64_t odd = special && random.once_in(2) ? random.below(std::max<int64_t>(1, N * (K / 2))) : -1;
    if (garbage) {
      for (int64_t i = 0; i < pattern.buffer.size(); i++) pattern.buffer.data()[i] = uint8_t(random.below(256));
      return;
    }
    dense.resize(size_t(N * K));
    slot.assign(size_t(N * K), -1);
    for (int64_t n = 0; n < N; n++) {
      int64_t next = 0;
      for (int64_t k = 0; k < K; k++)
        if (pattern.kept(n, k)) {
          const double number = random.once_in(9) ? double(random.below(3) - 1) : random.normal();
          const double not_finite = random.once_in(2) ? INFINITY : NAN;
          encode(type, n * (K / 2) + next == odd ? not_finite : number, values.at(n, next));
          dense[size_t(n * K + k)] = decode(type, values.at(n, next));
          slot[size_t(n * K + k)] = next++;
        }
    }
  }

  bool kept(int64_t n, int64_t k) const { return slot[size_t(n * K + k)] >= 0; }
  double weight(int64_t n, int64_t k) const { return dense[size_t(n * K + k)]; }

  // Calls `call(threads, result)` with one thread, then with several: the same numbers.  `result` gets the first ones.
  template <class Call> void same_for_threads(const char* name, Buffer& result, const Call& call) {
    Buffer other = result.copy();
    workers = 1;
    require(in_new_thread([&] { return call(1, result.data()); }) == 0, std::string(name) + " failed");
    constexpr int COUNTS[] = {2, 3, 5, 8};
    workers = COUNTS[random.below(4)];
    uneven = random.once_in(3);
    const int told = random.once_in(4) ? COUNTS[random.below(4)] : workers;  // the pool may change in between
    require(in_new_thread([&] { return call(told, other.data()); }) == 0, std::string(name) + " failed");
    require(same_numbers(result, other), std::string(name) + " depends on the number of threads");
  }

  // The same bits; of NaNs, which have many, only that they are.
  bool same_numbers(const Buffer& a, const Buffer& b) const {
    if (a == b) return true;
    for (int64_t i = 0; i < a.size(); i += SIZE[type])
      if (std::memcmp(a.data() + i, b.data() + i, size_t(SIZE[type])) != 0 &&
          !(std::isnan(decode(type, a.data() + i)) && std::isnan(decode(type, b.data() + i))))
        return false;
    return true;
  }

  template <class F> static int in_new_thread(const F& f) {
    int status = -1;
    std::thread([&] { status = f(); }).join();
    return status;
  }

  void forward() {
    const Matrix x = laid_out(random, type, M, K, special);
    const bool with_bias = random.once_in(2), low_rank = random.once_in(3);
    const int64_t R = low_rank ? (random.once_in(4) ? random.below(100) : random.below(10)) : 0;
    const Matrix bias = laid_out_contiguous(1, N), down = laid_out_contiguous(M, R), up = laid_out_contiguous(N, R);
    Matrix y = contiguous(type, M, N);
    same_for_threads("forward", y.buffer, [&](int threads, void* to) {
      return slope_cpu_forward(type, threads, x.buffer.data(), x.row_stride, x.column_stride, values.buffer.data(),
                               pattern.buffer.data(), with_bias ? bias.buffer.data() : nullptr,
                               low_rank ? down.buffer.data() : nullptr, low_rank ? up.buffer.data() : nullptr, R, to, M,
                               N, K);
    });
    const auto xs = x.numbers(), downs = down.numbers(), ups = up.numbers(), biases = bias.numbers(), ys = y.numbers();
    for (int64_t m = 0; m < M; m++)
      for (int64_t n = 0; n < N; n++) {
        Expected expected;
        for (int64_t k = 0; k < K; k++) expected.add(xs[size_t(m * K + k)], weight(n, k), kept(n, k));
        for (int64_t r = 0; r < R; r++) expected.add(downs[size_t(m * R + r)], ups[size_t(n * R + r)]);
        if (with_bias) expected.add(biases[size_t(n)], 1);
        check("forward", type, ys[size_t(m * N + n)], expected, m, n);
      }
  }

  Matrix laid_out_contiguous(int64_t rows, int64_t columns) {
    Matrix m = contiguous(type, rows, columns);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < columns; j++) encode(type, random.normal(), m.at(i, j));
    return m;
  }

  void grad_input(const Pattern* mask) {
    const char* name = mask != nullptr ? "grad_input (double-pruned)" : "grad_input";
    const Matrix grad = laid_out(random, type, M, N, special);
    Matrix dx = contiguous(type, M, K);
    same_for_threads(name, dx.buffer, [&](int threads, void* to) {
      return slope_cpu_grad_input(type, threads, grad.buffer.data(), grad.row_stride, grad.column_stride,
                                  values.buffer.data(), pattern.buffer.data(),
                                  mask != nullptr ? mask->buffer.data() : nullptr, to, M, N, K);
    });
    const auto grads = grad.numbers(), results = dx.numbers();
    for (int64_t m = 0; m < M; m++)
      for (int64_t k = 0; k < K; k++) {
        Expected expected;
        for (int64_t n = 0; n < N; n++)
          expected.add(grads[size_t(m * N + n)], weight(n, k),
                       kept(n, k) && (mask == nullptr || kept_twice(*mask, n, k)));
        check(name, type, results[size_t(m * K + k)], expected, m, k);
      }
  }

  void grad_weight() {
    const Matrix grad = laid_out(random, type, M, N, special), x = laid_out(random, type, M, K, special);
    const bool accumulate = random.once_in(2);
    Matrix dv = accumulate ? laid_out_contiguous(N, K / 2) : contiguous(type, N, K / 2);
    const auto before = dv.numbers();
    same_for_threads("grad_weight", dv.buffer, [&](int threads, void* to) {
      return slope_cpu_grad_weight(type, threads, grad.buffer.data(), grad.row_stride, grad.column_stride,
                                   x.buffer.data(), x.row_stride, x.column_stride, pattern.buffer.data(), to,
                                   accumulate, M, N, K);
    });
    const auto grads = grad.numbers(), xs = x.numbers(), results = dv.numbers();
    for (int64_t n = 0; n < N; n++)
      for (int64_t k = 0; k < K; k++) {
        if (!kept(n, k)) continue;
        const int64_t at = n * (K / 2) + slot[size_t(n * K + k)];
        Expected expected;
        for (int64_t m = 0; m < M; m++) expected.add(grads[size_t(m * N + n)], xs[size_t(m * K + k)]);
        if (accumulate) expected.add(before[size_t(at)], 1);
        check("grad_weight", type, results[size_t(at)], expected, n, k);
      }
  }

  void compress() {
    const Matrix full = laid_out(random, type, N, K, special);
    Matrix result = contiguous(type, N, K / 2);
    same_for_threads("compress", result.buffer, [&](int threads, void* to) {
      return slope_cpu_compress(type, threads, full.buffer.data(), full.row_stride, full.column_stride,
                                pattern.buffer.data(), to, N, K);
    });
    for (int64_t n = 0; n < N; n++)
      for (int64_t k = 0; k < K; k++)
        if (kept(n, k))
          require(std::memcmp(result.at(n, slot[size_t(n * K + k)]), full.at(n, k), size_t(SIZE[type])) == 0,
                  "compress took another element");
  }

  // Whether a column mask keeps the value of [n, k], one that the pattern keeps.
  bool kept_twice(const Pattern& mask, int64_t n, int64_t k) const { return mask.kept(n, slot[size_t(n * K + k)]); }

  Pattern empty_mask() const {
    const int64_t width = (K / 2 + 7) / 8;
    return {N, K / 2, width, Buffer(N * width)};
  }

  // Two of each four rows of a column, or what is left of them; at times fewer.
  Pattern draw_mask() {
    Pattern mask = empty_mask();
    for (int64_t i = 0; i < mask.buffer.size(); i++) mask.buffer.data()[i] = 0;
    const bool sparse = random.once_in(3);
    const Pattern given = draw_pattern(random, K, (N + 3) / 4 * 4);
    for (int64_t n = 0; n < N; n++)
      for (int64_t k = 0; k < K; k++) {
        if (!kept(n, k) || !given.kept(k, n) || (sparse && random.once_in(2))) continue;
        const int64_t at = slot[size_t(n * K + k)];
        mask.buffer.data()[n * mask.width + at / 8] |= uint8_t(1 << at % 8);
      }
    return mask;
  }

  void expand(const Pattern* mask) {
    const char* name = mask != nullptr ? "expand (double-pruned)" : "expand";
    Matrix result = contiguous(type, N, K);
    same_for_threads(name, result.buffer, [&](int threads, void* to) {
      return slope_cpu_expand(type, threads, values.buffer.data(), pattern.buffer.data(),
                              mask != nullptr ? mask->buffer.data() : nullptr, to, N, K);
    });
    const uint8_t zero[4] = {};
    for (int64_t n = 0; n < N; n++)
      for (int64_t k = 0; k < K; k++) {
        const bool is_there = kept(n, k) && (mask == nullptr || kept_twice(*mask, n, k));
        require(std::memcmp(result.at(n, k), is_there ? values.at(n, slot[size_t(n * K + k)]) : zero,
                            size_t(SIZE[type])) == 0,
                std::string(name) + " is wrong");
      }
  }

  void columns() {
    if (N % 4 != 0) return;
    Pattern picked = empty_mask();
    same_for_threads("pick_columns", picked.buffer, [&](int threads, void* to) {
      return slope_cpu_pick_columns(type, threads, values.buffer.data(), pattern.buffer.data(),
                                    static_cast<uint8_t*>(to), N, K);
    });
    for (int64_t n = 0; n < N; n++) {
      for (int64_t k = 0; k < K; k++)
        if (kept(n, k))
          require(kept_twice(picked, n, k) == is_picked(nullptr, n, k), "pick_columns picked another value");
      for (int64_t at = K / 2; at < 8 * picked.width; at++) require(!picked.kept(n, at), "pick_columns: a bit past K");
    }
    check_columns(nullptr);
    const Pattern given = draw_mask();
    check_columns(&given);
    const Pattern& mask = random.once_in(2) ? given : picked;
    expand(&mask);
    grad_input(&mask);
  }

  // Whether [n, k] is among the two largest of its column group, of what a mask keeps: fewer are larger, or as large and
  // earlier.
  bool is_picked(const Pattern* mask, int64_t n, int64_t k) const {
    int64_t before = 0;
    for (int64_t other = n / 4 * 4; other < n / 4 * 4 + 4; other++) {
      const double mine = size_of(masked(mask, n, k)), its = size_of(masked(mask, other, k));
      before += its > mine || (its == mine && other < n);
    }
    return before < 2;
  }

  double masked(const Pattern* mask, int64_t n, int64_t k) const {
    return kept(n, k) && (mask == nullptr || kept_twice(*mask, n, k)) ? weight(n, k) : 0;
  }

  void check_columns(const Pattern* mask) {
    const std::string name = mask != nullptr ? "compress_columns (masked)" : "compress_columns";
    const int64_t width = (N + 7) / 8;
    Matrix result = contiguous(type, K, N / 2);
    Pattern chosen{K, N, width, Buffer(K * width)};
    same_for_threads(name.c_str(), result.buffer, [&](int threads, void* to) {
      return slope_cpu_compress_columns(type, threads, values.buffer.data(), pattern.buffer.data(),
                                        mask != nullptr ? mask->buffer.data() : nullptr, to, chosen.buffer.data(), N, K);
    });
    require(slope_cpu_illegal_groups(chosen.buffer.data(), K, N) == 0, "illegal_groups refuses the column pattern");
    const uint8_t zero[4] = {};
    for (int64_t k = 0; k < K; k++) {
      int64_t next = 0;
      for (int64_t n = 0; n < N; n++) {
        require(chosen.kept(k, n) == is_picked(mask, n, k), name + " chose another pattern");
        if (!chosen.kept(k, n)) continue;
        const bool is_there = kept(n, k) && (mask == nullptr || kept_twice(*mask, n, k));
        require(std::memcmp(result.at(k, next++), is_there ? values.at(n, slot[size_t(n * K + k)]) : zero,
                            size_t(SIZE[type])) == 0,
                name + " is wrong");
      }
    }
  }

  // The magnitude; NaN is larger than infinity, and that larger than any number.
  static double size_of(double weight) {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    return std::isnan(weight) ? infinity : std::min(std::fabs(weight), std::numeric_limits<double>::max());
  }

  void illegal() {
    require(slope_cpu_illegal_groups(pattern.buffer.data(), N, K) == 0, "illegal_groups refuses a legal pattern");
    if (pattern.buffer.size() == 0) return;
    const Buffer damaged = pattern.buffer.copy();
    damaged.data()[random.below(damaged.size())] ^= uint8_t(1 << random.below(8));
    require(slope_cpu_illegal_groups(damaged.data(), N, K) == 1, "illegal_groups overlooks one bit");
  }

  // Every function on arbitrary bytes as metadata; nothing is said of the results.
  void run_on_garbage() {
    const Matrix x = laid_out(random, type, M, K, false), grad = laid_out(random, type, M, N, false);
    const Matrix y = contiguous(type, M, N), dx = contiguous(type, M, K), dv = contiguous(type, N, K / 2);
    const Matrix full = contiguous(type, N, K), result = contiguous(type, K, N / 2);
    const Pattern mask = empty_mask(), columns{K, N, (N + 7) / 8, Buffer(K * ((N + 7) / 8))};
    for (int64_t i = 0; i < mask.buffer.size(); i++) mask.buffer.data()[i] = uint8_t(random.below(256));
    const void *v = values.buffer.data(), *g = grad.buffer.data();
    const uint8_t *p = pattern.buffer.data(), *c = mask.buffer.data();
    workers = 2;
    in_new_thread([&] {
      slope_cpu_forward(type, 2, x.buffer.data(), x.row_stride, x.column_stride, v, p, nullptr, nullptr, nullptr, 0,
                        y.buffer.data(), M, N, K);
      slope_cpu_grad_input(type, 2, g, grad.row_stride, grad.column_stride, v, p, nullptr, dx.buffer.data(), M, N, K);
      slope_cpu_grad_input(type, 2, g, grad.row_stride, grad.column_stride, v, p, c, dx.buffer.data(), M, N, K);
      slope_cpu_grad_weight(type, 2, g, grad.row_stride, grad.column_stride, x.buffer.data(), x.row_stride,
                            x.column_stride, p, dv.buffer.data(), 0, M, N, K);
      slope_cpu_compress(type, 2, full.buffer.data(), K, 1, p, dv.buffer.data(), N, K);
      slope_cpu_expand(type, 2, v, p, nullptr, full.buffer.data(), N, K);
      slope_cpu_expand(type, 2, v, p, c, full.buffer.data(), N, K);
      if (N % 4 != 0) return 0;
      slope_cpu_compress_columns(type, 2, v, p, c, result.buffer.data(), columns.buffer.data(), N, K);
      slope_cpu_compress_columns(type, 2, v, p, nullptr, result.buffer.data(), columns.buffer.data(), N, K);
      return slope_cpu_pick_columns(type, 2, v, p, mask.buffer.data(), N, K);
    });
  }

  void run() {
    illegal();
    switch (random.below(5)) {
      case 0: compress(); expand(nullptr); columns(); break;
      case 1: {
        const Pattern mask = draw_mask();
        grad_input(random.once_in(2) ? &mask : nullptr);
        break;
      }
      case 2: grad_weight(); break;
      default: forward();
    }
  }
};

uint64_t current = 0;  // the seed under way

void say_seed() {
  std::fprintf(stderr, "%s: seed %llu\n", slope_cpu_isa(), static_cast<unsigned long long>(current));
}

}  // namespace

// The sanitizers end the process; there they call this first.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)(void));

int main(int argc, char** argv) {
  uint64_t seed = 1;
  double seconds = std::numeric_limits<double>::infinity();
  int64_t cases = std::numeric_limits<int64_t>::max(), largest = 200, failures = 1;
  bool garbage = false;
  for (int i = 1; i < argc; i += 2) {
    const std::string option = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : "";
    if (option == "--seed") {
      seed = std::strtoull(value, nullptr, 10);
    } else if (option == "--seconds") {
      seconds = std::strtod(value, nullptr);
    } else if (option == "--cases") {
      cases = std::strtoll(value, nullptr, 10);
    } else if (option == "--largest") {
      largest = std::strtoll(value, nullptr, 10);
    } else if (option == "--failures") {
      failures = std::strtoll(value, nullptr, 10);
    } else if (option == "--nulls") {
      nulls = std::strtoll(value, nullptr, 10) != 0;
    } else if (option == "--garbage") {
      garbage = std::strtoll(value, nullptr, 10) != 0;
    } else {
      std::fprintf(stderr, "unknown option %s\n", argv[i]);
      return 2;
    }
  }
  if (slope_cpu_abi() != 3 || !slope_cpu_supported()) {
    std::fprintf(stderr, "%s is not for this CPU\n", slope_cpu_isa());
    return 3;
  }
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(say_seed);
  slope_cpu_set_parallel(reinterpret_cast<void*>(&run_in_threads));
  const auto start = std::chrono::steady_clock::now();
  int64_t done = 0, failed = 0;
  for (; done < cases && failed < failures; done++) {
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds) break;
    current = seed + uint64_t(done);
    Case one(current, largest, garbage);
    try {
      garbage ? one.run_on_garbage() : one.run();
    } catch (const Failure& failure) {
      failed++;
      std::printf("%s: seed %llu, type %d, M = %lld, N = %lld, K = %lld: %s\n", slope_cpu_isa(),
                  static_cast<unsigned long long>(current), int(one.type), static_cast<long long>(one.M),
                  static_cast<long long>(one.N), static_cast<long long>(one.K), failure.what.c_str());
    }
  }
  std::printf("%s: %lld cases from seed %llu on, %lld wrong\n", slope_cpu_isa(), static_cast<long long>(done),
              static_cast<unsigned long long>(seed), static_cast<long long>(failed));
  return failed != 0;
}
