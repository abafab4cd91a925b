// What gram and mix share of the tensor cores: a warp's columns of many rows in shared memory, and numbers as two tf32.
#pragma once

#include "stream.h"

namespace fpg {

// A strip: kLine vectors of each of some rows, whole lines of the cache. Vectors lie where no two of eight neighbouring
// lanes meet in a bank: when they bring a row, when they read 4 vectors of 2 rows (gram), or 2 vectors of 4 rows (mix).
__device__ inline int place_in_strip(int row, int vector) {
  return row * kLine + (vector ^ (row % 4) ^ (row % 2 * (kLine / 2)));
}

// Asks for rows [first_row, first_row + 8 G), by a warp.
template <class Row, int G, class J>
__device__ inline void request_strip(const J& rows, int64_t first_row, int64_t first_column, Range columns, bool whole,
                                     Packed* strip) {
  constexpr int kRowsAtATime = 32 / kLine;
  const int lane = thread_index() % 32, own_row = lane / kLine;
  const int64_t column = first_column + lane % kLine * kVector<Row>;
  Packed* to = strip + place_in_strip(own_row, lane % kLine);
  if (whole) {
    Row* row = rows.template row<Row>(first_row + own_row);
#pragma unroll
    for (int k = 0; k < 8 * G; k += kRowsAtATime) {
      const int64_t t = first_row + own_row + k;
      if (k > 0) row = rows.below(row, t - kRowsAtATime, kRowsAtATime);
      copy_ahead<16>(to + k * kLine, row + column, rows.has(t));
    }
  } else {
#pragma unroll 1
    for (int k = 0; k < 8 * G; k += kRowsAtATime) {
      const int64_t t = first_row + own_row + k;
      request_some(rows.template row<Row>(t), column, rows.has(t) ? columns : Range{0, 0}, to + k * kLine);
    }
  }
}

// Joins the warps that share a strip.
template <int kWarpsOfStrip>
__device__ inline void sync_strip(int strip) {
  if constexpr (kWarpsOfStrip == 1) {
    sync_warp();
  } else {
    sync_threads(1 + strip, 32 * kWarpsOfStrip);
  }
}

// A number as the sum of two tf32: the nearest, and what is left, of which the tensor cores leave out one place at
// most. An inf gives a NaN; rounding may carry the bits of a NaN away, but then what is left is one.
__device__ inline uint32_t nearest_tf32(uint32_t bits) { return (bits + 0x1000) & ~0x1fffu; }
__device__ inline void split(uint32_t bits, uint32_t& high, uint32_t& low) {
  const uint32_t nearest = nearest_tf32(bits);
  low = float_to_bits(bits_to_float(bits) - bits_to_float(nearest));
  high = nearest;
}

// A choice of words, not of places in memory.
__device__ inline Packed chosen(bool first, const Packed& a, const Packed& b) {
  Packed packed;
#pragma unroll
  for (int w = 0; w < 4; ++w) packed.word[w] = first ? a.word[w] : b.word[w];
  return packed;
}

// The words of the lane whose number differs by `mask`.
__device__ inline Packed swap_words(const Packed& given, int mask) {
  Packed taken;
#pragma unroll
  for (int w = 0; w < 4; w += 2) {
    const uint64_t pair = static_cast<uint64_t>(given.word[w + 1]) << 32 | given.word[w];
    const uint64_t other = double_to_bits(shuffle_xor(bits_to_double(pair), mask));
    taken.word[w] = static_cast<uint32_t>(other);
    taken.word[w + 1] = static_cast<uint32_t>(other >> 32);
  }
  return taken;
}

}  // namespace fpg
