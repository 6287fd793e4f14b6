// Slots of pairs.h, made from values and metadata: for the forward product, and for the input gradient in two ways.
#pragma once

#include <array>

#include "kept_lanes.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)

namespace slope {

constexpr int64_t LANE_BLOCK = 32;

// The first `count` of 32 lanes.
inline __mmask32 first_lanes(int64_t count) { return __mmask32((uint64_t(1) << count) - 1); }

struct Slot {
  alignas(64) uint32_t index[16];  // two 16-bit columns of the block
  uint32_t weights[16];            // two bfloat16
};

// words [16 columns][8] -> 8 slots of 16 columns.
inline void transpose16x8(uint32_t* to, int64_t stride, const __m256i (&columns)[16]) {
  __m512i t[8], u[8];
  // Columns i and 4 + i side by side, then 8 + i and 12 + i.
  for (int h = 0; h < 8; h += 4) {
    for (int i = 0; i < 4; i++)
      t[h + i] = _mm512_inserti64x4(_mm512_castsi256_si512(columns[2 * h + i]), columns[2 * h + 4 + i], 1);
    for (int i = 0; i < 4; i += 2) {
      u[h + i] = _mm512_unpacklo_epi32(t[h + i], t[h + i + 1]);
      u[h + i + 1] = _mm512_unpackhi_epi32(t[h + i], t[h + i + 1]);
    }
    for (int j = 0; j < 2; j++) {
      t[h + 2 * j] = _mm512_unpacklo_epi64(u[h + j], u[h + j + 2]);
      t[h + 2 * j + 1] = _mm512_unpackhi_epi64(u[h + j], u[h + j + 2]);
    }
  }
  for (int j = 0; j < 4; j++) {
    _mm512_store_si512(to + j * stride, _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88));
    _mm512_store_si512(to + (4 + j) * stride, _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd));
  }
}

// The first two columns that a nibble names, in order, in the halves of a word.  A nibble with fewer than two bits
// (after a column mask) also names other columns, whose weights are zero.
alignas(64) inline constexpr std::array<uint32_t, 16> NAMED = {
    0x10000, 0x10000, 0x10000, 0x10000, 0x20000, 0x20000, 0x20001, 0x10000,
    0x30000, 0x30000, 0x30001, 0x10000, 0x30002, 0x20000, 0x20001, 0x10000};

// Slots of the forward product: outputs are rows of W, the reduction runs along its columns.
struct ForwardSlots {
  const BFloat16* values;  // [N, K / 2]
  const uint8_t* pattern;  // [N, ceil(K / 8)]
  int64_t N, K;

  static constexpr int MOST = 8;
  static constexpr bool OVERLAP = false;
  struct Nothing {};
  int64_t work_floats() const { return 0; }
  Nothing work(float*) const { return {}; }

  // Makes the slots of outputs [o0, o0 + count) and says how many there are.
  int operator()(Nothing, Slot* slots, int32_t* starts, int64_t o0, int64_t count, int64_t blocks) const {
    int at = 0;
    for (int64_t b = 0; b < blocks; b++) {
      starts[b] = at;
      at += block(slots + at, o0, count, b * LANE_BLOCK);
    }
    return at;
  }

 private:
  int block(Slot* slots, int64_t o0, int64_t count, int64_t r0) const {
    const int64_t width = pattern_width(K), columns = std::min(LANE_BLOCK, K - r0);
    const __m512i named = _mm512_load_si512(NAMED.data());
    alignas(64) uint32_t bits[16] = {};
    alignas(64) uint32_t pairs[16][8] = {};
    for (int64_t o = 0; o < count; o++) {
      const uint8_t* p = pattern + (o0 + o) * width + r0 / 8;
      const BFloat16* v = values + (o0 + o) * (K / 2) + r0 / 2;
      // The same columns of the next 16 rows: too many short streams for the hardware to see them coming.
      if (r0 % 64 == 0) __builtin_prefetch(v + 16 * (K / 2));
      if (r0 % 512 == 0) __builtin_prefetch(p + 16 * width);
      if (columns == LANE_BLOCK) {
        std::memcpy(&bits[o], p, 4);
        std::memcpy(pairs[o], v, 32);
      } else {
        std::memcpy(&bits[o], p, (columns + 7) / 8);
        std::memcpy(pairs[o], v, columns);
      }
    }
    const __m512i b = _mm512_load_si512(bits);
    Vec8 low[8], high[8];
    for (int i = 0; i < 8; i++) {
      low[i] = load8(reinterpret_cast<const float*>(pairs[i]));
      high[i] = load8(reinterpret_cast<const float*>(pairs[8 + i]));
    }
    transpose8(low);
    transpose8(high);
    const int groups = int(columns / 4);
    for (int g = 0; g < groups; g++) {
      const __m512i index = _mm512_permutexvar_epi32(_mm512_srl_epi32(b, _mm_cvtsi32_si128(4 * g)), named);
      _mm512_store_si512(slots[g].index, _mm512_add_epi32(index, _mm512_set1_epi32(4 * g * 0x10001)));
      store8(reinterpret_cast<float*>(slots[g].weights), low[g]);
      store8(reinterpret_cast<float*>(slots[g].weights + 8), high[g]);
    }
    return groups;
  }
};

alignas(64) inline constexpr std::array<uint16_t, 32> NUMBERS = [] {
  std::array<uint16_t, 32> numbers{};
  for (int n = 0; n < 32; n++) numbers[n] = uint16_t(n);
  return numbers;
}();

// 64 columns of W or W^{R,C} from a multiple of 64 on, brought together, and the metadata of 256: in the weight, rows
// are far apart, often a power of two, and the lines that one column wants would be lost from the cache before its
// neighbour wants them.
class Strip {
 public:
  static constexpr int64_t COLUMNS = 64, STRIPS = 4;  // columns of values; strips whose metadata comes at once

  // Floats of memory for so many rows.
  static int64_t floats(int64_t N) { return padded(N) * (COLUMNS / 4 + 3 * STRIPS); }

  Strip(float* memory, const BFloat16* values, const uint8_t* pattern, const uint8_t* column_mask, int64_t N, int64_t K)
      : values_(values), pattern_(pattern), column_mask_(column_mask), N_(N), K_(K), rows_(padded(N)),
        strip_(reinterpret_cast<BFloat16*>(memory)),
        bits_(reinterpret_cast<uint64_t*>(memory + rows_ * (COLUMNS / 4))),
        masks_(reinterpret_cast<uint32_t*>(memory + rows_ * (COLUMNS / 4 + 2 * STRIPS))) {}

  // Brings the strip of column o, if it is not there.
  void bring(int64_t o) {
    const int64_t before = at_;
    at_ = o / COLUMNS;
    if (at_ == before) return;
    if (before < 0 || at_ / STRIPS != before / STRIPS) {
      bring(bits_, pattern_, pattern_width(K_));
      if (column_mask_ != nullptr) bring(masks_, column_mask_, mask_width(K_));
    }
    bring_values();
  }

  // dense [32] = rows [r0, r0 + 32), columns [o, o + 16), and bits of what is kept in each; zeros past N and K.
  void expand(__m256i (&dense)[32], uint16_t (&bits)[32], int64_t r0, int64_t o) const {
    const int64_t column = o % COLUMNS, at = at_ % STRIPS * rows_ + r0;
    for (int n = 0; n < 32; n++) {
      const auto* kept = reinterpret_cast<const __m128i*>(strip_ + (r0 + n) * (COLUMNS / 2) + column / 2);
      bits[n] = uint16_t(bits_[at + n] >> column);
      dense[n] = _mm256_mask_expand_epi16(_mm512_castsi512_si256(fresh_zero()), bits[n],
                                          _mm256_castsi128_si256(_mm_load_si128(kept)));
      if (column_mask_ != nullptr) bits[n] = uint16_t(kept_by_both(bits[n], masks_[at + n] >> column / 2));
    }
  }

 private:
  static constexpr int64_t AHEAD_ROWS = 32;  // asked for before their turn, in L2: in L1 few such rows have room
  static int64_t padded(int64_t N) { return ceil_div(N, LANE_BLOCK) * LANE_BLOCK; }

  void bring_values() {
    const int64_t there = std::min(COLUMNS, K_ - at_ * COLUMNS);
    const __mmask32 mask = first_lanes(there / 2);
    const BFloat16* v = values_ + at_ * (COLUMNS / 2);
    const uint32_t* also = column_mask_ != nullptr ? masks_ + at_ % STRIPS * rows_ : nullptr;
    for (int64_t n = 0; n < rows_; n++, v += K_ / 2) {
      if (n + AHEAD_ROWS < N_) __builtin_prefetch(v + AHEAD_ROWS * (K_ / 2), 0, 2);
      const __mmask32 kept = n < N_ ? mask & (also != nullptr ? also[n] : ~__mmask32(0)) : 0;
      _mm512_store_si512(strip_ + n * (COLUMNS / 2), _mm512_maskz_loadu_epi16(kept, v));
    }
  }

  // to [STRIPS][N] words, one a strip, of rows of `width` bytes.
  template <class Word> void bring(Word* to, const uint8_t* from, int64_t width) {
    const int64_t first = at_ / STRIPS * STRIPS * int64_t(sizeof(Word));
    const int64_t bytes = std::min<int64_t>(STRIPS * sizeof(Word), width - first);
    const uint8_t* p = from + first;
    for (int64_t n = 0; n < rows_; n++, p += width) {
      if (n + AHEAD_ROWS < N_) __builtin_prefetch(p + AHEAD_ROWS * width, 0, 2);
      Word words[STRIPS] = {};
      if (n < N_) {
        if (bytes == sizeof words)
          std::memcpy(words, p, sizeof words);
        else
          std::memcpy(words, p, bytes);
      }
      for (int64_t s = 0; s < STRIPS; s++) to[s * rows_ + n] = words[s];
    }
  }

  const BFloat16* values_;
  const uint8_t *pattern_, *column_mask_;
  int64_t N_, K_, rows_, at_ = -1;
  BFloat16* strip_;  // [N][32]
  uint64_t* bits_;   // [STRIPS][N]
  uint32_t* masks_;  // [STRIPS][N], a bit for each value
};

// word c: bit n says whether row n keeps column c.
inline void bits_of_columns(uint32_t (&columns)[16], const uint16_t (&rows)[32]) {
  const __m512i bits = _mm512_load_si512(rows);
  for (int c = 0; c < 16; c++) columns[c] = _mm512_test_epi16_mask(bits, _mm512_set1_epi16(int16_t(1 << c)));
}

// What slots of an input gradient are made of: outputs are columns of W, the reduction runs along its rows.
struct StripSlots {
  const BFloat16* values;
  const uint8_t* pattern;
  const uint8_t* column_mask;  // [N, ceil(K / 16)], or nullptr: exact
  int64_t N, K;

  int64_t work_floats() const { return Strip::floats(N); }
  Strip work(float* memory) const { return Strip(memory, values, pattern, column_mask, N, K); }
};

// Slots of the double-pruned input gradient that cost little to make: one for each group of four rows, of which a
// column keeps two at most, as in a forward product.  8 where ColumnSlots finds 6.9.
struct GroupSlots : StripSlots {
  static constexpr int MOST = 8;
  static constexpr bool OVERLAP = false;

  int operator()(Strip& strip, Slot* slots, int32_t* starts, int64_t o0, int64_t, int64_t blocks) const {
    strip.bring(o0);
    int at = 0;
    for (int64_t b = 0; b < blocks; b++) {
      starts[b] = at;
      at += block(strip, slots + at, o0, b * LANE_BLOCK);
    }
    return at;
  }

 private:
  int block(const Strip& strip, Slot* slots, int64_t o0, int64_t r0) const {
    alignas(64) uint32_t bits[16];
    alignas(64) uint16_t row_bits[32];
    __m256i dense[32];
    strip.expand(dense, row_bits, r0, o0);
    bits_of_columns(bits, row_bits);
    const __m512i b = _mm512_load_si512(bits), named = _mm512_load_si512(NAMED.data());
    const __m512i columns = _mm512_setr_epi32(0, 0x10001, 0x20002, 0x30003, 0x40004, 0x50005, 0x60006, 0x70007, 0x80008,
                                              0x90009, 0xa000a, 0xb000b, 0xc000c, 0xd000d, 0xe000e, 0xf000f);
    const int groups = int(ceil_div(std::min(LANE_BLOCK, N - r0), 4));
    for (int g = 0; g < groups; g++) {
      const __m512i index = _mm512_permutexvar_epi32(_mm512_srl_epi32(b, _mm_cvtsi32_si128(4 * g)), named);
      auto rows = [&](int n) { return _mm512_inserti64x4(_mm512_castsi256_si512(dense[n]), dense[n + 1], 1); };
      // Row i of the group and column c: element 16 i + c of four rows.
      const __m512i at = _mm512_add_epi32(_mm512_slli_epi32(index, 4), columns);
      const __m512i weights = _mm512_permutex2var_epi16(rows(4 * g), at, rows(4 * g + 2));
      _mm512_store_si512(slots[g].index, _mm512_add_epi32(index, _mm512_set1_epi32(4 * g * 0x10001)));
      _mm512_store_si512(slots[g].weights, weights);
    }
    return groups;
  }
};

// As few slots as the fullest column needs, found by a search.
struct ColumnSlots : StripSlots {
  static constexpr int MOST = 16;
  static constexpr bool OVERLAP = true;

  int operator()(Strip& strip, Slot* slots, int32_t* starts, int64_t o0, int64_t, int64_t blocks) const {
    strip.bring(o0);
    int at = 0;
    Columns now, next, middle;
    for (int64_t b = 0; b < blocks; b++) {
      const bool last = b + 1 == blocks;
      if (b == 0) load(strip, now, o0, 0);
      starts[2 * b] = at;
      at += take(slots + at, now, last ? ~0u : 0xffffu);
      if (last) break;
      load(strip, next, o0, (b + 1) * LANE_BLOCK);
      for (int c = 0; c < 16; c++) {
        middle.kept[c] = now.kept[c] >> 16 | next.kept[c] << 16;
        middle.weights[c] = _mm512_shuffle_i64x2(now.weights[c], next.weights[c], 0x4e);
      }
      starts[2 * b + 1] = at;
      at += take(slots + at, middle, 0xffffu);
      for (int c = 0; c < 16; c++) next.kept[c] = (next.kept[c] & 0xffff0000u) | middle.kept[c] >> 16;
      now = next;
    }
    return at;
  }

 private:
  // 16 columns of a block of 32 rows: what is kept and in no slot yet, and all weights.
  struct Columns {
    uint32_t kept[16];
    __m512i weights[16];
  };

  // Slots for what is kept in the rows `due`, and in what is free of them for the rows that follow.
  static int take(Slot* slots, Columns& columns, uint32_t due) {
    int most = 0;
    for (int c = 0; c < 16; c++) most = std::max(most, __builtin_popcount(columns.kept[c] & due));
    const int used = (most + 1) / 2;
    const uint32_t first = uint32_t((uint64_t(1) << 2 * used) - 1);
    const __m512i numbers = _mm512_load_si512(NUMBERS.data());
    const int64_t stride = sizeof(Slot) / sizeof(uint32_t);
    __m512i index[16], weights[16];
    for (int c = 0; c < 16; c++) {
      const uint32_t taken = _pdep_u32(first, columns.kept[c]);
      columns.kept[c] &= ~taken;
      index[c] = _mm512_mask_compress_epi16(fresh_zero(), taken, numbers);
      weights[c] = _mm512_mask_compress_epi16(fresh_zero(), taken, columns.weights[c]);
    }
    if (used <= 8) {
      __m256i low[16];
      for (int c = 0; c < 16; c++) low[c] = _mm512_castsi512_si256(index[c]);
      transpose16x8(slots->index, stride, low);
      for (int c = 0; c < 16; c++) low[c] = _mm512_castsi512_si256(weights[c]);
      transpose16x8(slots->weights, stride, low);
      return used;
    }
    transpose16(index);
    transpose16(weights);
    for (int i = 0; i < used; i++) {
      _mm512_store_si512(slots[i].index, index[i]);
      _mm512_store_si512(slots[i].weights, weights[i]);
    }
    return used;
  }

  void load(const Strip& strip, Columns& columns, int64_t o0, int64_t r0) const {
    alignas(64) uint16_t bits[32];
    __m256i dense[32];
    strip.expand(dense, bits, r0, o0);
    // Rows n and 16 + n of W, side by side.
    __m512i (&r)[16] = columns.weights;
    for (int n = 0; n < 16; n++) r[n] = _mm512_inserti64x4(_mm512_castsi256_si512(dense[n]), dense[16 + n], 1);
    columns_of_rows(r);
    bits_of_columns(columns.kept, bits);
  }

  // 16 vectors of (row r, row 16 + r), each of 16 columns -> 16 columns of 32 rows.
  static void columns_of_rows(__m512i (&r)[16]) {
    __m512i t[16];
    for (int h = 0; h < 16; h += 8) {
      __m512i u[8];
      for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm512_unpacklo_epi16(r[h + 2 * i], r[h + 2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi16(r[h + 2 * i], r[h + 2 * i + 1]);
      }
      for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
          u[i + 2 * j] = _mm512_unpacklo_epi32(t[i + j], t[i + j + 2]);
          u[i + 2 * j + 1] = _mm512_unpackhi_epi32(t[i + j], t[i + j + 2]);
        }
      for (int j = 0; j < 4; j++) {
        r[h + 2 * j] = _mm512_unpacklo_epi64(u[j], u[4 + j]);
        r[h + 2 * j + 1] = _mm512_unpackhi_epi64(u[j], u[4 + j]);
      }
    }
    const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
    const __m512i odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    for (int c = 0; c < 8; c++) {
      t[c] = _mm512_permutex2var_epi64(r[c], even, r[8 + c]);
      t[8 + c] = _mm512_permutex2var_epi64(r[c], odd, r[8 + c]);
    }
    for (int c = 0; c < 16; c++) r[c] = t[c];
  }
};

// Slots of dense weights [outputs, extra] (the low-rank branch): all pairs.
inline int dense_slots(Slot* slots, const BFloat16* weights, int64_t extra, int64_t o0, int64_t count, int64_t r0) {
  const int columns = int(std::min(LANE_BLOCK, extra - r0));
  for (int i = 0; i < (columns + 1) / 2; i++)
    for (int o = 0; o < 16; o++) {
      const BFloat16* w = weights + (o0 + o) * extra + r0 + 2 * i;
      slots[i].index[o] = uint32_t(2 * i) | uint32_t(2 * i + 1) << 16;
      slots[i].weights[o] = o < count ? PairWord::word(w, 2 * i + 1 < columns ? w + 1 : nullptr) : 0;
    }
  return (columns + 1) / 2;
}

}  // namespace slope

#endif
