// mix of 9 to 64 rows on the tensor cores: C times strips of J, as two tf32 of each fp32 number; 16-bit numbers are
// tf32 as they are.
//
// A strip of all rows lies in shared memory, brought there ahead of time; a warp multiplies it with 16 rows of C at a
// time and stores 16 new rows. A lane reads 16 bytes of two rows of J and takes each element for another product, which
// has its columns kVector apart: so what a lane gets of a new row is 16 bytes of neighbours again.
#pragma once

#include "mix_tiles.h"
#include "tensor.h"

namespace fpg {

// P: T, rounded up to 16, 32 or 64.
constexpr int kMostRowsOfMixTensor = 64;
template <int P>
struct MixTensor {
  static constexpr int kWarpsOfStrip = P > 32 ? 2 : 1;  // which share its rows and its new rows
  static constexpr int kStrips = kWarps / kWarpsOfStrip;
  static constexpr int kRowBlocks = P / 16, kTaskBlocks = P / 8;
  using StripRing = Ring<kStrips * P * kLine / kThreads>;
  // Of each block of 16 x 8 coefficients, what each lane has of them: rounded to tf32, then what is left.
  static constexpr int kOperands = kRowBlocks * kTaskBlocks * 2 * 32;
  static constexpr int kBytes = StripRing::kBytes + kOperands * static_cast<int>(sizeof(Packed));
};

// The coefficients as operands. For all threads of a block.
template <int P>
__device__ inline void take_operands(const double* coefficients, int tasks, Packed* operands) {
  sync_block();  // those before are done with
  for (int k = thread_index(); k < MixTensor<P>::kOperands / 2; k += kThreads) {
    const int lane = k % 32, block = k / 32;
    Packed high, low;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int i = block / MixTensor<P>::kTaskBlocks * 16 + lane / 4 + w % 2 * 8;
      const int t = block % MixTensor<P>::kTaskBlocks * 8 + lane % 4 + w / 2 * 4;
      const float value = i < tasks && t < tasks ? static_cast<float>(coefficients[i * tasks + t]) : 0;
      split(float_to_bits(value), high.word[w], low.word[w]);
    }
    operands[block * 64 + lane] = high;
    operands[block * 64 + 32 + lane] = low;
  }
  sync_block();
}

// Which of a row's kLine vectors column n of a product comes from: so that the four lanes of a row of products get
// neighbouring vectors, and once more.
__device__ inline int vector_of_column(int n) { return n % 2 * (kLine / 2) + n / 2; }

// One vector of a new row, as far as its columns belong to the item.
template <class Row>
__device__ inline void store_part(const Rows& rows, int64_t t, int64_t column, Range columns, bool whole,
                                  Packed value) {
  if (!rows.has(t)) return;
  Row* to = rows.row<Row>(t) + column;
  if (whole) return store_packed(to, value);
  const Part part = part_of_vector<Row>(column, columns);
#pragma unroll
  for (int v = 0; v < kVector<Row>; ++v) {
    if (part.has(v)) to[v] = element_of<Row>(value, v);
  }
}

// Steps at a time: with two of 16-bit rows sm_120 spills registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kMixSteps = 1;
#else
constexpr int kMixSteps = 2;
#endif

// 16 new rows of a strip: rows 16 `block` on.
template <class Row, int P>
__device__ inline void mix_strip(const Rows& rows, const Packed* strip, const Packed* operands, int block,
                                 int64_t column, Range columns, bool whole) {
  constexpr bool kSplit = sizeof(Row) == 4;
  const int lane = thread_index() % 32, g = lane / 4, q = lane % 4;
  // Of fp32 rows, small products have sums of their own, so that the large ones are rounded seldom.
  float sums[kVector<Row>][4] = {}, small[kSplit ? kVector<Row> : 1][4] = {};
#pragma unroll kMixSteps
  for (int k = 0; k < divide_up(rows.tasks, 8); ++k) {
    const Packed* own = operands + (block * MixTensor<P>::kTaskBlocks + k) * 64 + lane;
    const Packed high = own[0], low = own[32];
    const Packed x = strip[place_in_strip(8 * k + q, vector_of_column(g))];
    const Packed y = strip[place_in_strip(8 * k + q + 4, vector_of_column(g))];
#pragma unroll
    for (int v = 0; v < kVector<Row>; ++v) {
      uint32_t right[2] = {float_to_bits(element<Row>(x, v)), float_to_bits(element<Row>(y, v))};
      if constexpr (kSplit) {
        uint32_t rest[2];
        split(right[0], right[0], rest[0]);
        split(right[1], right[1], rest[1]);
        multiply_add<Product::kTf32>(small[v], high.word, rest);
      }
      multiply_add<Product::kTf32>(kSplit ? small[kSplit ? v : 0] : sums[v], low.word, right);
      multiply_add<Product::kTf32>(sums[v], high.word, right);
    }
  }
  const auto rounded = [&](int place) {
    Packed packed = zeros();
#pragma unroll
    for (int v = 0; v < kVector<Row>; ++v) {
      Row value;
      round_to(&value, sums[v][place] + (kSplit ? small[kSplit ? v : 0][place] : 0));
      set_element(packed, v, value);
    }
    return packed;
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Of rows g and g + 1 each lane has half a line. Two lanes swap halves, so that whole lines are stored: the even
    // one's second half for the odd one's first.
    const bool odd = g % 2 != 0;
    const Packed first = rounded(2 * half), second = rounded(2 * half + 1);
    const Packed taken = swap_words(chosen(odd, first, second), 4);
    const int64_t even_row = 16 * block + 8 * half + g - g % 2;
    const int64_t to = column + (q + (odd ? kLine / 2 : 0)) * kVector<Row>;
    store_part<Row>(rows, even_row, to, columns, whole, chosen(odd, taken, first));
    store_part<Row>(rows, even_row + 1, to, columns, whole, chosen(odd, second, taken));
  }
}

// All items of a block, 8 < T <= P. Shared memory: MixTensor<P>::kBytes.
template <class Row, int P>
__device__ inline void mix_tensor(const MixJob& job) {
  using Shape = MixTensor<P>;
  constexpr int64_t kStripWidth = kLine * kVector<Row>, kWidth = Shape::kStrips * kStripWidth;
  const Rows& rows = job.rows;
  const typename Shape::StripRing ring = {reinterpret_cast<Packed*>(shared_memory())};
  Packed* operands = ring.vectors + Shape::StripRing::kBytes / sizeof(Packed);
  const int warp = thread_index() / 32, strip = warp / Shape::kWarpsOfStrip, share = warp % Shape::kWarpsOfStrip;
  const int own = strip * P * kLine;  // the warp's strip in a stage

  for_items_to_mix(job, [&](const Item& item, const double* coefficients, bool wide, bool other) {
    const Range columns = item.columns;
    if (wide) return mix_tiles_of_item<Row, double>(rows, coefficients, columns);
    if (other) take_operands<P>(coefficients, rows.tasks, operands);
    const int64_t first = columns.first / kWidth, last = divide_up(columns.last, kWidth);
    const auto column_of = [&](int k) { return (last - 1 - k) * kWidth; };
    const auto is_whole = [&](int k) { return rows.aligned && contains(columns, column_of(k), kWidth); };
    const auto request = [&](int k, Packed* stage) {
      constexpr int kRows = P / Shape::kWarpsOfStrip;
      request_strip<Row, kRows / 8>(rows, share * kRows, column_of(k) + strip * kStripWidth, columns, is_whole(k),
                                    stage + own + share * kRows * kLine);
    };
    const auto take = [&](int k, const Packed* stage) {
      for (int block = share; block < Shape::kRowBlocks; block += Shape::kWarpsOfStrip) {
        if (16 * block >= rows.tasks) break;
        mix_strip<Row, P>(rows, stage + own, operands, block, column_of(k) + strip * kStripWidth, columns, is_whole(k));
      }
    };
    const auto sync = [&] { sync_strip<Shape::kWarpsOfStrip>(strip); };
    if (columns.first < columns.last) stream_steps(ring, 0, static_cast<int>(last - first), sync, request, take);
  });
}

// Above 8 rows: rows of the strips by which they are mixed, 0 by tiles.
FPG_HOST_DEVICE constexpr int rows_of_strips(int64_t tasks, int64_t itemsize) {
  if (itemsize == 8 || tasks > kMostRowsOfMixTensor) return 0;
  return tasks <= 16 ? 16 : tasks <= 32 ? 32 : 64;
}
inline int64_t mix_many_bytes(int64_t tasks, int64_t itemsize, int strips) {
  if (strips == 0) return mix_tile_bytes(tasks, itemsize, warps_of_mix(tasks, itemsize));
  return strips == 16 ? MixTensor<16>::kBytes : strips == 32 ? MixTensor<32>::kBytes : MixTensor<64>::kBytes;
}

}  // namespace fpg
