// mix: J <- C J in place, last columns first, as combine.
//
// Up to 8 rows a thread holds its columns of all rows and writes each new row at once. Above, a block takes a tile of
// all rows into shared memory; a warp computes a few new rows of it at a time, from coefficients that lie there as
// well.
#pragma once

#include "combine.h"

namespace fpg {

struct MixJob {
  Rows rows;
  Plan plan;
  const double* coefficients;  // [segments, T, T]
};

// A whole step of aligned rows, T <= R.
template <class Row, int U, int R>
__device__ inline void mix_whole(const Rows& rows, const double* coefficients, int64_t column, Kept kept,
                                 int64_t number) {
  Packed x[U][R];
  if (number < kept.steps) {
    kept.load(number, x);
  } else {
    load_owned<Row>(rows, 0, column, x);
  }
#pragma unroll 1
  for (int i = 0; i < rows.tasks; ++i) {
    Row* own = rows.row<Row>(i) + column + thread_index() * kVector<Row>;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      Accumulator<Row> sums[kVector<Row>] = {};
      add_weighted<Row>(x[u], coefficients + i * rows.tasks, 0, rows.tasks, sums);
      store_rounded(own + u * (kThreads * kVector<Row>), sums);
    }
  }
}

// Any step, with the roundings of a whole one if Acc is the rows' accumulator.
template <class Row, class Acc, int R>
__device__ FPG_RARE void mix_some(const Rows& rows, const double* coefficients, int64_t column, int64_t count,
                                  Range columns) {
  for_columns(column, count, columns, [&](int64_t n) {
    Acc x[R];
    load_column<Row>(rows, 0, n, x);
#pragma unroll 1
    for (int i = 0; i < rows.tasks; ++i) {
      Acc sum = 0;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r < rows.tasks) sum = fused(static_cast<Acc>(coefficients[i * rows.tasks + r]), x[r], sum);
      }
      round_to(rows.row<Row>(i) + n, sum);
    }
  });
}

// An item's steps, backwards. `coefficients` lie in shared memory.
template <class Row, int U, int R>
__device__ inline void mix_item(const MixJob& job, const Item& item, const double* coefficients, bool wide, Kept kept,
                                int64_t first_kept) {
  const Range steps = steps_of(job.plan, item.columns);
  for (int64_t step = steps.last - 1; step >= steps.first; --step) {
    const int64_t column = step * job.plan.step;
    const bool whole = job.rows.aligned && contains(item.columns, column, job.plan.step);
    const int64_t number = first_kept + step - item.slot * (job.plan.span / job.plan.step);
    if (wide) {
      mix_some<Row, double, R>(job.rows, coefficients, column, job.plan.step, item.columns);
    } else if (whole) {
      mix_whole<Row, U, R>(job.rows, coefficients, column, kept, number);
    } else {
      mix_some<Row, Accumulator<Row>, R>(job.rows, coefficients, column, job.plan.step, item.columns);
    }
  }
}

// All items of a block, T <= R. Shared memory at `coefficients`: T * T doubles.
template <class Row, int U, int R>
__device__ inline void mix_all(const MixJob& job, double* coefficients) {
  const int64_t square = static_cast<int64_t>(job.rows.tasks) * job.rows.tasks;
  int64_t segment = -1;
  bool wide = false;
  for (int64_t item = job.plan.items - 1 - block_index(); item >= 0; item -= blocks()) {
    const Item found = job.rows.item(job.plan, item);
    if (found.segment != segment) {
      segment = found.segment;
      wide = take_weights(job.coefficients + segment * square, square, coefficients);
    }
    mix_item<Row, U, R>(job, found, coefficients, wide, {nullptr, 0}, 0);
  }
}

// Columns of a lane in a tile: few where a tile of T rows would not fit.
constexpr int kMostRowsOfWideTile = 64;
FPG_HOST_DEVICE constexpr int mix_columns(int64_t tasks, int64_t itemsize) {
  return tasks <= kMostRowsOfWideTile && itemsize < 8 ? 4 : 1;
}
// New rows that a warp computes at a time.
template <class Acc>
constexpr int kNewRows = sizeof(Acc) == 4 ? 8 : 4;

// Shared memory of mix_tiles: the tile, then the coefficients of one pass of the warps over the new rows.
inline int64_t mix_tile_bytes(int64_t tasks, int64_t itemsize) {
  const int64_t tile = tasks * 32 * mix_columns(tasks, itemsize) * itemsize;
  return tile + kWarps * tasks * (kNewRows<float> * static_cast<int64_t>(sizeof(float)));
}
static_assert(kNewRows<double> * sizeof(double) == kNewRows<float> * sizeof(float), "one size serves both");

// The coefficients of the new rows [first, first + kWarps * kNewRows), for each warp [T][kNewRows].
template <class Acc>
__device__ inline void take_coefficients(const double* from, int64_t tasks, int64_t first, Acc* to) {
  constexpr int kRows = kNewRows<Acc>;
  for (int64_t k = thread_index(); k < kWarps * kRows * tasks; k += kThreads) {
    const int64_t i = first + k / tasks, t = k % tasks;
    to[(k / tasks / kRows * tasks + t) * kRows + k / tasks % kRows] =
        i < tasks ? static_cast<Acc>(from[i * tasks + t]) : 0;
  }
}

// kColumns neighbours of a row, as one access where that is aligned.
template <class Row, int kColumns>
struct alignas(kColumns * sizeof(Row)) Neighbours {
  Row values[kColumns];
};

template <class Row, class Acc, int kColumns>
__device__ inline void mix_tile_rows(const Rows& rows, const Row* tile, const Acc* coefficients, int64_t first_row,
                                     int64_t column, Range columns, bool whole) {
  constexpr int kRows = kNewRows<Acc>;
  const int lane = thread_index() % 32;
  Acc sums[kRows][kColumns] = {};
#pragma unroll 2
  for (int64_t t = 0; t < rows.tasks; ++t) {
    const auto x = reinterpret_cast<const Neighbours<Row, kColumns>*>(tile)[t * 32 + lane];
    const auto c = *reinterpret_cast<const Neighbours<Acc, kRows>*>(coefficients + t * kRows);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        sums[r][k] = fused(c.values[r], static_cast<Acc>(widened(x.values[k])), sums[r][k]);
      }
    }
  }
  const int64_t own = column + lane * kColumns;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first_row + r >= rows.tasks) break;
    Row* row = rows.row<Row>(first_row + r);
    Neighbours<Row, kColumns> rounded;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) round_to(&rounded.values[k], sums[r][k]);
    if (whole) {
      *reinterpret_cast<Neighbours<Row, kColumns>*>(row + own) = rounded;
      continue;
    }
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      if (own + k >= columns.first && own + k < columns.last) row[own + k] = rounded.values[k];
    }
  }
}

template <class Row, class Acc, int kColumns>
__device__ inline void mix_tile(const Rows& rows, const double* coefficients, int64_t column, Range columns, bool whole,
                                bool fresh, Row* tile, Acc* narrow) {
  constexpr int kRows = kNewRows<Acc>;
  constexpr int64_t kWidth = 32 * kColumns;
  constexpr int64_t kVectors = kWidth / kVector<Row>;
  const int64_t tasks = rows.tasks;
  sync_block();  // the tile before is done with
  for (int64_t k = thread_index(); k < tasks * kVectors; k += kThreads) {
    const Row* row = rows.row<Row>(k / kVectors);
    const int64_t first = column + k % kVectors * kVector<Row>;
    const Packed x = whole ? load_packed(row + first) : load_some(row, first, columns);
    reinterpret_cast<Packed*>(tile)[k] = x;
  }
  for (int64_t first = 0; first < tasks; first += kWarps * kRows) {
    if (first > 0) sync_block();
    if (fresh || tasks > kWarps * kRows) take_coefficients(coefficients, tasks, first, narrow);
    sync_block();
    const int warp = thread_index() / 32;
    const int64_t own = first + warp * kRows;
    if (own < tasks) {
      mix_tile_rows<Row, Acc, kColumns>(rows, tile, narrow + warp * kRows * tasks, own, column, columns, whole);
    }
  }
}

// All items of a block, any T. Shared memory: mix_tile_bytes.
template <class Row, int kColumns>
__device__ inline void mix_tiles(const MixJob& job) {
  const int64_t tasks = job.rows.tasks, square = tasks * tasks;
  constexpr int64_t kWidth = 32 * kColumns;
  Row* tile = reinterpret_cast<Row*>(shared_memory());
  void* narrow = tile + tasks * kWidth;
  int64_t segment = -1;
  bool wide = false;
  for (int64_t item = job.plan.items - 1 - block_index(); item >= 0; item -= blocks()) {
    const Item found = job.rows.item(job.plan, item);
    const double* coefficients = job.coefficients + found.segment * square;
    bool fresh = found.segment != segment;
    if (fresh) {
      segment = found.segment;
      bool unsafe = false;
      for (int64_t k = thread_index(); k < square; k += kThreads) unsafe = unsafe || unsafe_weight(coefficients[k]);
      wide = any_in_block(unsafe);
    }
    const Range columns = found.columns;
    if (columns.first == columns.last) {
      segment = -1;  // its coefficients were not taken
      continue;
    }
    for (int64_t n = divide_up(columns.last, kWidth) - 1; n >= columns.first / kWidth; --n) {
      const bool whole = job.rows.aligned && contains(columns, n * kWidth, kWidth);
      if (wide || kIsDouble<Row>) {
        mix_tile<Row, double, kColumns>(job.rows, coefficients, n * kWidth, columns, whole, fresh, tile,
                                        static_cast<double*>(narrow));
      } else if constexpr (!kIsDouble<Row>) {
        mix_tile<Row, float, kColumns>(job.rows, coefficients, n * kWidth, columns, whole, fresh, tile,
                                       static_cast<float*>(narrow));
      }
      fresh = false;
    }
  }
}

}  // namespace fpg
