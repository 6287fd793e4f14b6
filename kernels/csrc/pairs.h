// Y = A S for sparse S with bfloat16 instructions (AVX512_BF16, VBMI2): lanes run along the outputs.
//
// vdpbf16ps multiplies pairs: sum += a0 b0 + a1 b1 in every 32-bit lane.  For 32 neighbouring numbers of the reduction
// (a block) each output wants some pairs of them; a slot holds one pair for each of 16 outputs:
//
//   sums [16 outputs] += dot2(permute(A[m, block], index [16]), weights [16])      for every slot, for every m
//
// The permutation (vpermw) picks from a register, so A is not transposed and half of the multiplications of a dense
// product are never issued.  A forward product has one slot for each group of four columns: 8 a block.
//
// An input gradient has as many slots as its fullest column needs.  In blocks of their own that would be 10.6 on
// average, 8 if it is double-pruned.  But its blocks overlap by half, so that every number of the reduction is in two
// of them (all but the first 16): what a column has too many of in one half it may take earlier, while other columns
// fill the slots.  What is left is 8.9, or 6.9.
//
//   LANE_ROWS   rows of A at once: as many sums and as many blocks of A in registers
//   lists       [blocks of the reduction][slots](index [16], weights [16]) for 16 outputs, made once for a panel of A
#pragma once

#include "slots.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)

namespace slope {

constexpr int LANE_ROWS = 12;
constexpr int64_t LANE_PANEL = 85 * LANE_ROWS;
constexpr int64_t PANEL_BYTES = 4 << 20;    // of the packed panel, about: every 16 outputs read all of it
constexpr int64_t GROUPED = 768;            // tokens up to which a double-pruned gradient takes GroupSlots
constexpr int64_t LISTS_BYTES = 512 << 10;  // of the outputs that share a pass over the panel: part of the L2 cache

// Slots of 16 outputs: those of block b are slots[starts[b]] to slots[starts[b + 1]].  Where blocks overlap, 2 b is
// block b and 2 b + 1 is the second half of it with the first half of the next.
struct SlotLists {
  Slot* slots;
  int32_t* starts;
};

// s [ROWS] += the slots of one block, a [ROWS][32].
template <int ROWS>
inline const Slot* add_slots(__m512 (&s)[ROWS], const __m512i (&a)[ROWS], const Slot* slot, const Slot* end) {
  for (; slot < end; slot++) {
    const __m512i index = _mm512_load_si512(slot->index), weights = _mm512_load_si512(slot->weights);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
      s[r] = _mm512_dpbf16_ps(s[r], (__m512bh)_mm512_permutexvar_epi16(index, a[r]), (__m512bh)weights);
  }
  return slot;
}

// y [ROWS, 16], `stride` apart, of ROWS rows of a packed tile [blocks][ROWS][32]; `stored` of the 16 outputs exist.
template <bool OVERLAP, int ROWS>
void pair_tile(BFloat16* y, int64_t stride, __mmask16 stored, const BFloat16* tile, const SlotLists& lists,
               int64_t blocks, __m512 bias) {
  __m512 s[ROWS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++) s[r] = bias;
  const Slot* slot = lists.slots;
  for (int64_t b = 0; b < blocks; b++, tile += ROWS * LANE_BLOCK) {
    __m512i a[ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) a[r] = _mm512_load_si512(tile + r * LANE_BLOCK);
    slot = add_slots(s, a, slot, lists.slots + lists.starts[OVERLAP ? 2 * b + 1 : b + 1]);
    if (OVERLAP && b + 1 < blocks) {
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; r++) {
        const auto* half = reinterpret_cast<const __m256i*>(tile + r * LANE_BLOCK) + 1;
        const auto* next = reinterpret_cast<const __m256i*>(tile + (ROWS + r) * LANE_BLOCK);
        a[r] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_load_si256(half)), _mm256_load_si256(next), 1);
      }
      slot = add_slots(s, a, slot, lists.slots + lists.starts[2 * b + 2]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(s[r]);
    _mm256_mask_storeu_epi16(y + r * stride, stored, rounded);
  }
}

using PairTile = void (*)(BFloat16*, int64_t, __mmask16, const BFloat16*, const SlotLists&, int64_t, __m512);

template <bool OVERLAP> inline PairTile pair_tile_of(int rows) {
  static constexpr PairTile tiles[LANE_ROWS] = {
      pair_tile<OVERLAP, 1>, pair_tile<OVERLAP, 2>, pair_tile<OVERLAP, 3>,  pair_tile<OVERLAP, 4>,
      pair_tile<OVERLAP, 5>, pair_tile<OVERLAP, 6>, pair_tile<OVERLAP, 7>,  pair_tile<OVERLAP, 8>,
      pair_tile<OVERLAP, 9>, pair_tile<OVERLAP, 10>, pair_tile<OVERLAP, 11>, pair_tile<OVERLAP, 12>};
  return tiles[rows - 1];
}

// to [blocks][rows][32] = a[i0 .. i0 + rows, 0 .. columns), zeros past them.
inline void pack_blocks(BFloat16* to, Matrix<BFloat16> a, int64_t i0, int rows, int64_t columns) {
  for (int64_t j0 = 0; j0 < columns; j0 += LANE_BLOCK)
    for (int r = 0; r < rows; r++, to += LANE_BLOCK) {
      const int count = int(std::min(LANE_BLOCK, columns - j0));
      if (a.columns == 1) {
        const __mmask32 there = first_lanes(count);
        _mm512_store_si512(to, _mm512_maskz_loadu_epi16(there, a.at(i0 + r, j0)));
      } else {
        for (int j = 0; j < LANE_BLOCK; j++) to[j] = j < count ? *a.at(i0 + r, j0 + j) : BFloat16{0};
      }
    }
}

// The product; arguments as in product() (product.h).  `fill(work, slots, starts, o0, count, blocks)` makes the slots
// of outputs [o0, o0 + count), in so many blocks of the reduction, and says how many there are.
template <class Fill>
int pair_product(int threads, Matrix<BFloat16> a, int64_t M, int64_t reduction, Matrix<BFloat16> extra,
                 const BFloat16* extra_weights, int64_t extra_size, const BFloat16* bias, BFloat16* y, int64_t outputs,
                 const Fill& fill) {
  const int64_t main_blocks = ceil_div(reduction, LANE_BLOCK), extra_blocks = ceil_div(extra_size, LANE_BLOCK);
  const int64_t blocks = main_blocks + extra_blocks, depth = std::max<int64_t>(1, blocks * LANE_BLOCK);
  const int64_t fitting = std::min(LANE_PANEL, std::max<int64_t>(8, PANEL_BYTES / (depth * 2 * LANE_ROWS)) * LANE_ROWS);
  // As many panels as fit best, all of a size: a small last one would have lists of its own for little.
  const int64_t panels = std::max<int64_t>(1, (M + fitting / 2) / fitting);
  const int64_t panel_rows = ceil_div(ceil_div(M, panels), LANE_ROWS) * LANE_ROWS;
  BFloat16* panel = reinterpret_cast<BFloat16*>(shared_a.floats(ceil_div(panel_rows * depth, 2)));
  if (panel == nullptr) return 1;
  const int64_t most_slots = main_blocks * Fill::MOST + extra_blocks * 16;
  const int64_t slot_floats = sizeof(Slot) / sizeof(float);
  const int64_t spans = Fill::OVERLAP ? std::max<int64_t>(0, 2 * blocks - 1) : blocks;
  const int64_t list_floats = most_slots * slot_floats + ceil_div(spans + 1, 16) * 16;
  // Outputs that share a pass: as many as fit the cache, the same for every thread.
  const int64_t lanes = ceil_div(outputs, 16);
  const int64_t most_lanes = std::clamp<int64_t>(LISTS_BYTES / (list_floats * int64_t(sizeof(float))), 1, 16);
  const int64_t group = block_size(lanes, threads, most_lanes, 1);
  Failure failed;

  for (int64_t m0 = 0; m0 < M; m0 += panel_rows) {
    const int64_t rows = std::min(panel_rows, M - m0), tiles = ceil_div(rows, LANE_ROWS);
    const int64_t tile_rows = ceil_div(rows, tiles);
    auto rows_of = [&](int64_t t) { return int(std::max<int64_t>(0, std::min(tile_rows, rows - t * tile_rows))); };
    parallel(threads, tiles, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        BFloat16* to = panel + t * tile_rows * depth;
        if (rows_of(t) == 0) continue;
        pack_blocks(to, a, m0 + t * tile_rows, rows_of(t), reduction);
        pack_blocks(to + main_blocks * rows_of(t) * LANE_BLOCK, extra, m0 + t * tile_rows, rows_of(t), extra_size);
      }
    });
    parallel(threads, ceil_div(lanes, group), [&](int64_t begin, int64_t end) {
      float* memory = own.floats(group * list_floats + fill.work_floats());
      if (memory == nullptr) {
        failed.note();
        return;
      }
      auto work = fill.work(memory + group * list_floats);
      for (int64_t first = begin * group; first < std::min(lanes, end * group); first += group) {
        const int64_t count = std::min({group, lanes - first, end * group - first});
        auto lists_of = [&](int64_t i) {
          Slot* slots = reinterpret_cast<Slot*>(memory + i * list_floats);
          return SlotLists{slots, reinterpret_cast<int32_t*>(slots + most_slots)};
        };
        for (int64_t i = 0; i < count; i++) {
          const SlotLists lists = lists_of(i);
          const int64_t o0 = (first + i) * 16, there = std::min<int64_t>(16, outputs - o0);
          int32_t at = fill(work, lists.slots, lists.starts, o0, there, main_blocks);
          for (int64_t b = 0; b < extra_blocks; b++) {
            lists.starts[main_blocks + b] = at;
            at += dense_slots(lists.slots + at, extra_weights, extra_size, o0, there, b * LANE_BLOCK);
          }
          lists.starts[spans] = at;
        }
        for (int64_t t = 0; t < tiles; t++) {
          if (rows_of(t) == 0) continue;
          const PairTile tile = pair_tile_of<Fill::OVERLAP>(rows_of(t));
          for (int64_t i = 0; i < count; i++) {
            const int64_t o0 = (first + i) * 16, there = std::min<int64_t>(16, outputs - o0);
            alignas(64) float start[16] = {};
            if (bias != nullptr)
              for (int64_t o = 0; o < there; o++) start[o] = to_float(bias[o0 + o]);
            tile(y + (m0 + t * tile_rows) * outputs + o0, outputs, __mmask16((1u << there) - 1),
                 panel + t * tile_rows * depth, lists_of(i), blocks, _mm512_load_ps(start));
          }
        }
      }
    });
    if (failed) return 1;
  }
  return 0;
}

// The same without bias and low-rank branch.
template <class Fill>
int pair_product(int threads, Matrix<BFloat16> a, int64_t M, int64_t reduction, BFloat16* y, int64_t outputs,
                 const Fill& fill) {
  const BFloat16* none = nullptr;
  return pair_product(threads, a, M, reduction, Matrix<BFloat16>{}, none, 0, none, y, outputs, fill);
}

}  // namespace slope

#endif
