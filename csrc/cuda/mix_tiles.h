// mix by tiles in shared memory, for any number of rows: float64 rows, coefficients that ask for float64, and more rows
// than mix_tensor.h takes. A block takes a tile of all rows; a warp computes a few new rows of it at a time, from
// coefficients that lie there as well.
#pragma once

#include "mix.h"

namespace fpg {

constexpr int kTileWidth = 32;  // columns, one for each lane
// New rows that a warp computes at a time.
template <class Acc>
constexpr int kNewRows = sizeof(Acc) == 4 ? 8 : 4;
template <class Acc>
struct alignas(kNewRows<Acc> * sizeof(Acc)) NewRows {
  Acc values[kNewRows<Acc>];
};

// Shared memory: the tile, then the coefficients of one pass of the warps over the new rows.
FPG_HOST_DEVICE constexpr int64_t mix_tile_bytes(int64_t tasks, int64_t itemsize, int warps) {
  return tasks * (kTileWidth * itemsize + warps * static_cast<int64_t>(sizeof(NewRows<float>)));
}
// Warps that compute: half of them where all the coefficients of a pass would take more than each device's block may
// have, of which the smallest is 99 KiB. Two blocks of this size fit where one of the larger would.
constexpr int64_t kMostTileBytes = 96 * 1024;
FPG_HOST_DEVICE constexpr int warps_of_mix(int64_t tasks, int64_t itemsize) {
  return mix_tile_bytes(tasks, itemsize, kWarps) <= kMostTileBytes ? kWarps : kWarps / 2;
}
static_assert(mix_tile_bytes(kLargestTasks, 8, warps_of_mix(kLargestTasks, 8)) <= kMostTileBytes, "any rows fit");
static_assert(mix_tile_bytes(kLargestTasks, 4, warps_of_mix(kLargestTasks, 4)) <= kMostTileBytes, "any rows fit");
static_assert(sizeof(NewRows<double>) == sizeof(NewRows<float>), "one size serves both");

// The coefficients of the new rows [first, first + warps * kNewRows), for each warp [T].
template <class Acc>
__device__ inline void take_coefficients(const double* from, int64_t tasks, int64_t first, int warps,
                                         NewRows<Acc>* to) {
  constexpr int kRows = kNewRows<Acc>;
  for (int64_t k = thread_index(); k < warps * kRows * tasks; k += kThreads) {
    const int64_t i = first + k / tasks, t = k % tasks;
    to[k / tasks / kRows * tasks + t].values[k / tasks % kRows] = i < tasks ? static_cast<Acc>(from[i * tasks + t]) : 0;
  }
}

template <class Row, class Acc>
__device__ inline void mix_tile_rows(const Rows& rows, const Row* tile, const NewRows<Acc>* coefficients,
                                     int64_t first_row, int64_t column, Range columns) {
  const int lane = thread_index() % 32;
  NewRows<Acc> sums = {};
#pragma unroll 2
  for (int64_t t = 0; t < rows.tasks; ++t) {
    const Acc x = static_cast<Acc>(widened(tile[t * kTileWidth + lane]));
    const NewRows<Acc> c = coefficients[t];
#pragma unroll
    for (int r = 0; r < kNewRows<Acc>; ++r) sums.values[r] = fused(c.values[r], x, sums.values[r]);
  }
  if (column + lane < columns.first || column + lane >= columns.last) return;
#pragma unroll
  for (int r = 0; r < kNewRows<Acc>; ++r) {
    if (first_row + r < rows.tasks) round_to(rows.row<Row>(first_row + r) + column + lane, sums.values[r]);
  }
}

template <class Row, class Acc>
__device__ inline void mix_tile(const Rows& rows, const double* coefficients, int64_t column, Range columns, bool fresh,
                                Row* tile, NewRows<Acc>* narrow) {
  constexpr int64_t kVectors = kTileWidth / kVector<Row>;
  const int64_t tasks = rows.tasks;
  const int warps = warps_of_mix(tasks, sizeof(Row));
  const int64_t pass = warps * kNewRows<Acc>;
  const bool whole = rows.aligned && contains(columns, column, kTileWidth);
  sync_block();  // the tile before is done with
  for (int64_t k = thread_index(); k < tasks * kVectors; k += kThreads) {
    const Row* row = rows.row<Row>(k / kVectors);
    const int64_t first = column + k % kVectors * kVector<Row>;
    reinterpret_cast<Packed*>(tile)[k] = whole ? load_packed(row + first) : load_some(row, first, columns);
  }
  for (int64_t first = 0; first < tasks; first += pass) {
    if (first > 0) sync_block();
    if (fresh || tasks > pass) take_coefficients(coefficients, tasks, first, warps, narrow);
    sync_block();
    const int warp = thread_index() / 32;
    const int64_t own = first + warp * kNewRows<Acc>;
    if (warp < warps && own < tasks) mix_tile_rows<Row>(rows, tile, narrow + warp * tasks, own, column, columns);
  }
}

// An item's tiles, last ones first. For all threads of a block.
template <class Row, class Acc>
__device__ FPG_RARE void mix_tiles_of_item(const Rows& rows, const double* coefficients, Range columns) {
  if (columns.first == columns.last) return;
  Row* tile = reinterpret_cast<Row*>(shared_memory());
  NewRows<Acc>* narrow = reinterpret_cast<NewRows<Acc>*>(tile + rows.tasks * kTileWidth);
  bool fresh = true;
  for (int64_t n = divide_up(columns.last, kTileWidth) - 1; n >= columns.first / kTileWidth; --n) {
    mix_tile<Row, Acc>(rows, coefficients, n * kTileWidth, columns, fresh, tile, narrow);
    fresh = false;
  }
}

// Whether one of a problem's coefficients asks for float64. For all threads of a block.
__device__ inline bool any_unsafe(const double* weights, int64_t count) {
  bool unsafe = false;
  for (int64_t k = thread_index(); k < count; k += kThreads) unsafe = unsafe || unsafe_weight(weights[k]);
  return any_in_block(unsafe);
}

// Calls body(item, its coefficients, whether they ask for float64, whether they are other ones than before) for all
// items of a block.
template <class Body>
__device__ inline void for_items_to_mix(const MixJob& job, Body body) {
  const int64_t square = static_cast<int64_t>(job.rows.tasks) * job.rows.tasks;
  int64_t segment = -1;
  bool wide = false;
  for (int64_t item = job.plan.items - 1 - block_index(); item >= 0; item -= blocks()) {
    const Item found = job.rows.item(job.plan, item);
    const double* coefficients = job.coefficients + found.segment * square;
    const bool other = found.segment != segment;
    if (other) wide = any_unsafe(coefficients, square);
    segment = found.segment;
    body(found, coefficients, wide, other);
  }
}

// All items of a block, any T. Shared memory: mix_tile_bytes.
template <class Row>
__device__ inline void mix_tiles(const MixJob& job) {
  for_items_to_mix(job, [&](const Item& item, const double* coefficients, bool wide, bool) {
    if (wide || kIsDouble<Row>) {
      mix_tiles_of_item<Row, double>(job.rows, coefficients, item.columns);
    } else {
      mix_tiles_of_item<Row, Accumulator<Row>>(job.rows, coefficients, item.columns);
    }
  });
}

}  // namespace fpg
