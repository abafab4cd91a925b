// mix: J <- C J in place, last columns first, as combine. Up to 8 rows a thread holds its columns of all rows and
// writes each new row at once; above, mix_tensor.h and mix_tiles.h.
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
__device__ inline void mix_whole(const Rows& rows, const Accumulator<Row>* coefficients, int64_t column,
                                 Kept<U * R> kept, int number) {
  Packed x[U][R];
  if (kept.has(number)) {
    read_owned(kept.ring.stage(number) + thread_index(), x);
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
template <class Row, int R, class Acc>
__device__ FPG_RARE void mix_some(const Rows& rows, const Acc* coefficients, int64_t column, int64_t count,
                                  Range columns) {
  const int64_t end = column + count < columns.last ? column + count : columns.last;
#pragma unroll 1
  for (int64_t n = column + thread_index(); n < end; n += kThreads) {
    if (n < columns.first) continue;
    Acc x[R];
#pragma unroll
    for (int r = 0; r < R; ++r) x[r] = r < rows.tasks ? static_cast<Acc>(widened(rows.row<Row>(r)[n])) : 0;
#pragma unroll 1
    for (int i = 0; i < rows.tasks; ++i) {
      Acc sum = 0;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r < rows.tasks) sum = fused(coefficients[i * rows.tasks + r], x[r], sum);
      }
      round_to(rows.row<Row>(i) + n, sum);
    }
  }
}

// An item's steps, backwards. `coefficients` lie in shared memory; `exact`: in float64, if they ask for it.
template <class Row, int U, int R>
__device__ inline void mix_item(const MixJob& job, const Item& item, const Accumulator<Row>* coefficients,
                                const double* exact, Kept<U * R> kept, int first_number) {
  const Range steps = steps_of(job.plan, item.columns);
  for (int64_t step = steps.last - 1; step >= steps.first; --step) {
    const int64_t column = step * job.plan.step;
    const bool whole = job.rows.aligned && contains(item.columns, column, job.plan.step);
    const int number = first_number + static_cast<int>(step - item.slot * (job.plan.span / job.plan.step));
    if (exact != nullptr) {
      mix_some<Row, R>(job.rows, exact, column, job.plan.step, item.columns);
    } else if (whole) {
      mix_whole<Row, U, R>(job.rows, coefficients, column, kept, number);
    } else {
      mix_some<Row, R>(job.rows, coefficients, column, job.plan.step, item.columns);
    }
  }
}

// All items of a block, T <= R. Shared memory at `coefficients`: T * T numbers.
template <class Row, int U, int R>
__device__ inline void mix_all(const MixJob& job, Accumulator<Row>* coefficients) {
  const int64_t square = static_cast<int64_t>(job.rows.tasks) * job.rows.tasks;
  int64_t segment = -1;
  const double* exact = nullptr;
  for (int64_t item = job.plan.items - 1 - block_index(); item >= 0; item -= blocks()) {
    const Item found = job.rows.item(job.plan, item);
    if (found.segment != segment) {
      segment = found.segment;
      const double* given = job.coefficients + found.segment * square;
      exact = take_weights(given, square, coefficients) ? given : nullptr;
    }
    mix_item<Row, U, R>(job, found, coefficients, exact, {{nullptr}, kNever}, 0);
  }
}

}  // namespace fpg
