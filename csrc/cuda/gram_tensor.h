// gram above 8 rows, on the tensor cores; float64 rows by tiles of 8, as up to 8 rows.
//
// Warps share a strip of all rows of a tile, each with 16 of them: of these it has the products with all rows that the
// lower triangle asks for. Both operands of J J^T are rows of J and place the columns alike, so 16 bytes of a row are
// operand words of both as they lie in memory.
//
// bf16 and fp16 products are exact. An fp32 number is high + low, two tf32 each, and G = H H^T + L H^T + (L H^T)^T,
// where L L^T is left out (2^-22 of the product). L H^T is small enough to stay in fp32 to the end of an item.
#pragma once

#include <type_traits>

#include "gram.h"
#include "tensor.h"

namespace fpg {

template <class Row>
constexpr Product kProductOf = Product::kTf32;
template <>
constexpr Product kProductOf<Half> = Product::kHalf;
template <>
constexpr Product kProductOf<BFloat> = Product::kBFloat;
template <class Row>
constexpr bool kIsSplit = kProductOf<Row> == Product::kTf32;

// A tile of G groups of 8 rows. kCross: the first half of the rows with the second half alone.
template <int G, bool kCross>
struct Tile {
  static constexpr int kRows = 8 * G, kRowBlocks = (G + 1) / 2, kStrips = kWarps / kRowBlocks;
  static_assert(kRowBlocks == warps_of_strip(kRows), "the plan's step is that of the strips");
  using StripRing = Ring<kStrips * kRows * kLine / kThreads, 3>;
  // When the ring is done with: H H^T, then L H^T, of each strip, or of all where they take much memory. A pitch that
  // lanes of many rows do not meet in a bank with.
  static constexpr int kPitch = kRows + 1, kSquare = kRows * kPitch, kSums = G < 8 ? kStrips : 1;
  static constexpr int kSumsBytes = kSums * kSquare * static_cast<int>(sizeof(double) + sizeof(float));
  static constexpr int kBytes = StripRing::kBytes > kSumsBytes ? StripRing::kBytes : kSumsBytes;

  // Whether the products of block r of 16 rows with group n are asked for, in H H^T and in L H^T.
  FPG_HOST_DEVICE static constexpr bool has_high(int r, int n) {
    return kCross ? r < kRowBlocks / 2 && n >= G / 2 : n <= 2 * r + 1;
  }
  FPG_HOST_DEVICE static constexpr bool has_low(int r, int n) {
    return !kCross || (r < kRowBlocks / 2) == (n >= G / 2);
  }
};

// The products of rows [16 r, 16 r + 16) of a strip, by a warp, in registers.
template <class Row, int G, bool kCross, int kBlock>
struct RowBlock {
  using Shape = Tile<G, kCross>;
  static constexpr int kSlabProducts = 4 * kVector<Row>;
  static constexpr int kSlabsOfLane = kProductsOfLane / kSlabProducts;
  static_assert(kSlabs % kSlabsOfLane == 0, "sums are flushed within a step");

  double totals[G][4];
  float high[G][4];
  float low[G][4];

  __device__ void multiply(const Packed* strip) {
    const int lane = thread_index() % 32, row = lane / 4;
#pragma unroll(kSlabsOfLane)
    for (int slab = 0; slab < kSlabs; ++slab) {
      const int own = place_in_strip(row, 4 * slab + lane % 4);  // 8 rows on, places are the same
      const Packed x = strip[16 * kBlock * kLine + own];
      const Packed y = 2 * kBlock + 1 < G ? strip[(16 * kBlock + 8) * kLine + own] : zeros();
      Packed others[G];
#pragma unroll
      for (int n = 0; n < G; ++n) others[n] = strip[8 * n * kLine + own];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t left[4] = {x.word[2 * half], y.word[2 * half], x.word[2 * half + 1], y.word[2 * half + 1]}, rest[4];
        if constexpr (kIsSplit<Row>) {
#pragma unroll
          for (int w = 0; w < 4; ++w) split(left[w], left[w], rest[w]);
        }
#pragma unroll
        for (int n = 0; n < G; ++n) {
          uint32_t right[2] = {others[n].word[2 * half], others[n].word[2 * half + 1]};
          if constexpr (kIsSplit<Row>) {
            right[0] = nearest_tf32(right[0]);
            right[1] = nearest_tf32(right[1]);
            if (Shape::has_low(kBlock, n)) multiply_add<Product::kTf32>(low[n], rest, right);
          }
          if (Shape::has_high(kBlock, n)) multiply_add<kProductOf<Row>>(high[n], left, right);
        }
      }
      if ((slab + 1) % kSlabsOfLane == 0) flush();
    }
  }

  __device__ void flush() {
#pragma unroll
    for (int n = 0; n < G; ++n) {
      if (!Shape::has_high(kBlock, n)) continue;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        totals[n][k] += static_cast<double>(high[n][k]);
        high[n][k] = 0;
      }
    }
  }

  // To matrices [kRows, kPitch]. `more`: to what another strip has stored.
  __device__ void store(double* to_high, float* to_low, bool more) const {
    const int lane = thread_index() % 32;
#pragma unroll
    for (int n = 0; n < G; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (2 * kBlock + k / 2 >= G) continue;
        const int place = (16 * kBlock + lane / 4 + k / 2 * 8) * Shape::kPitch + 8 * n + lane % 4 * 2 + k % 2;
        if (Shape::has_high(kBlock, n)) to_high[place] = more ? to_high[place] + totals[n][k] : totals[n][k];
        if (kIsSplit<Row> && Shape::has_low(kBlock, n)) to_low[place] = more ? to_low[place] + low[n][k] : low[n][k];
      }
    }
  }
};

// body(block) with the number of a warp's block as a constant.
template <int kBlocks, int kBlock = 0, class Body>
__device__ inline void with_row_block(int block, Body body) {
  if (block == kBlock) return body(std::integral_constant<int, kBlock>());
  if constexpr (kBlock + 1 < kBlocks) with_row_block<kBlocks, kBlock + 1>(block, body);
}

// One item and tile: its rows are [first.i, ...) in the first half and [first.j, ...) in the second. Shared memory:
// Tile::kBytes.
template <class Row, int G, bool kCross, class J>
__device__ inline void gram_tensor(const GramJob<J>& job, int64_t item, Pair first) {
  using Shape = Tile<G, kCross>;
  constexpr int kRows = Shape::kRows;
  const Item found = job.rows.item(job.plan, item);
  const auto& rows = job.rows.of(found);
  const Range steps = steps_of(job.plan, found.columns);
  const int count = static_cast<int>(steps.last - steps.first);
  // Steps [first_whole, last_whole) of the item are whole, and aligned.
  const int first_whole = !rows.aligned ? count : found.columns.first % job.plan.step == 0 ? 0 : 1;
  const int last_whole = found.columns.last % job.plan.step == 0 ? count : count - 1;
  const int warp = thread_index() / 32, strip = warp / Shape::kRowBlocks;
  const typename Shape::StripRing ring = {reinterpret_cast<Packed*>(shared_memory())};
  double* high = reinterpret_cast<double*>(shared_memory());
  float* low = reinterpret_cast<float*>(high + Shape::kSums * Shape::kSquare);

  with_row_block<Shape::kRowBlocks>(warp % Shape::kRowBlocks, [&](auto number) {
    constexpr int kBlock = decltype(number)::value;
    constexpr int kGroups = 2 * kBlock + 1 < G ? 2 : 1;
    const int64_t first_row =
        16 * kBlock < kRows / 2 || Shape::kRowBlocks == 1 ? first.i + 16 * kBlock : first.j + 16 * kBlock - kRows / 2;
    RowBlock<Row, G, kCross, kBlock> products = {};
    const auto request = [&](int k, Packed* stage) {
      const int64_t column = (steps.first + k) * job.plan.step;
      const bool whole = k >= first_whole && k < last_whole;
      request_strip<Row, kGroups>(rows, first_row, column + strip * (kLine * kVector<Row>), found.columns, whole,
                                  stage + (strip * kRows + 16 * kBlock) * kLine);
    };
    const auto take = [&](int, const Packed* stage) { products.multiply(stage + strip * kRows * kLine); };
    const auto sync = [&] { sync_strip<Shape::kRowBlocks>(strip); };
    stream_steps(ring, 0, count, sync, request, take);
    const int own = strip % Shape::kSums * Shape::kSquare;
    for (int turn = 0; turn < Shape::kStrips / Shape::kSums; ++turn) {
      sync_block();  // all warps are done with the ring, or with their turn
      if (strip / Shape::kSums == turn) products.store(high + own, low + own, turn > 0);
    }
  });
  sync_block();

  double* partial = job.partials + item * pair_index(rows.tasks, 0);
  constexpr int kHalf = kRows / 2;
  constexpr int kPairs = kCross ? kHalf * kHalf : static_cast<int>(pair_index(kRows, 0));
  for (int k = thread_index(); k < kPairs; k += kThreads) {
    const Pair own = kCross ? Pair{k / kHalf, kHalf + k % kHalf} : pair_of(k);
    const int place = static_cast<int>(own.i * Shape::kPitch + own.j);
    const int mirrored = static_cast<int>(own.j * Shape::kPitch + own.i);
    double sum = 0;
    for (int s = 0; s < Shape::kSums; ++s) {
      sum += high[s * Shape::kSquare + place];
      if constexpr (kIsSplit<Row>) {
        sum += static_cast<double>(low[s * Shape::kSquare + place]) + low[s * Shape::kSquare + mirrored];
      }
    }
    store_pair(rows, {first.i + own.i, kCross ? first.j + own.j - kHalf : first.i + own.j}, sum, partial);
  }
  sync_block();
}

// One item and tile above 8 rows. G = 0: float64 rows, a pair of tiles. kMany: more than one tile.
template <class Row, int G, bool kMany, class J>
__device__ inline void gram_tile(const GramJob<J>& job, int64_t item, int64_t tile) {
  if constexpr (G == 0) {
    const Pair pair = pair_of(tile);
    double* sums = reinterpret_cast<double*>(shared_memory());
    if (pair.i == pair.j) {
      gram_columns<Row, 8, 0, 1, false>(job, item, pair.i, pair.j, sums, {nullptr}, 0);
    } else {
      gram_columns<Row, 8, 8, 1, false>(job, item, pair.i, pair.j, sums, {nullptr}, 0);
    }
  } else if constexpr (!kMany) {
    gram_tensor<Row, G, false>(job, item, {0, Tile<G, false>::kRows / 2});
  } else {
    const Pair first = rows_of_tile(job.rows.tasks, tile);
    if (tile < divide_up(job.rows.tasks, kRowsOfTile)) {
      gram_tensor<Row, G, false>(job, item, first);
    } else {
      gram_tensor<Row, G, true>(job, item, first);
    }
  }
}
template <int G>
constexpr int gram_tile_bytes() {
  if constexpr (G == 0) {
    return column_sums_bytes(8, 8);
  } else {
    return Tile<G, false>::kBytes;
  }
}
// How many blocks of such a kernel a multiprocessor should hold: what its registers allow.
constexpr int blocks_for_tiles(int groups) { return groups > 0 && groups <= 4 ? 2 : 1; }

}  // namespace fpg
