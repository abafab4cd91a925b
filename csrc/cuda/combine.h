// combine: w J, last columns first: the pass before read those last, and they are in the cache.
//
// A thread owns columns: it reads them of all rows before it writes them, so `out` may be one of the rows.
#pragma once

#include "rows.h"

namespace fpg {

struct CombineJob {
  Rows rows;  // aligned: with out
  Plan plan;
  const double* weights;  // [segments, T]
  void* out;
};

// Rounded to fp32 and multiplied with fp32 elements, such a weight would lose its meaning.
__device__ inline bool unsafe_weight(double weight) {
  const double magnitude = weight < 0 ? -weight : weight;
  return magnitude > kSafeWeightMax || (magnitude < kSafeWeightMin && magnitude != 0);
}

// Copies weights into shared memory; whether one of them asks for float64. For all threads of a block.
__device__ inline bool take_weights(const double* from, int64_t count, double* to) {
  bool unsafe = false;
  sync_block();  // the weights before are done with
  for (int64_t k = thread_index(); k < count; k += kThreads) {
    to[k] = from[k];
    unsafe = unsafe || unsafe_weight(from[k]);
  }
  return any_in_block(unsafe);
}

// sums += rows [first, first + R) of one vector, each times its weight.
template <class Row, int R>
__device__ inline void add_weighted(const Packed (&x)[R], const double* weights, int64_t first, int tasks,
                                    Accumulator<Row> (&sums)[kVector<Row>]) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (first + r >= tasks) break;
    const Accumulator<Row> weight = static_cast<Accumulator<Row>>(weights[first + r]);
#pragma unroll
    for (int v = 0; v < kVector<Row>; ++v) sums[v] = fused(weight, element<Row>(x[r], v), sums[v]);
  }
}

// A whole step of aligned rows. T <= R, or U = 1: then R rows at a time.
template <class Row, int U, int R>
__device__ inline void combine_whole(const Rows& rows, const double* weights, Row* out, int64_t column, Kept kept,
                                     int64_t number) {
  Row* own = out + column + thread_index() * kVector<Row>;
  Packed x[U][R];
  if (number < kept.steps) {
    kept.load(number, x);
  } else {
    load_owned<Row>(rows, 0, column, x);
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    Accumulator<Row> sums[kVector<Row>] = {};
    add_weighted<Row>(x[u], weights, 0, rows.tasks, sums);
    if constexpr (U == 1) {
      for (int64_t first = R; first < rows.tasks; first += R) {
        load_owned<Row>(rows, first, column, x);
        add_weighted<Row>(x[0], weights, first, rows.tasks, sums);
      }
    }
    store_rounded(own + u * (kThreads * kVector<Row>), sums);
  }
}

// Any step, with the roundings of a whole one if Acc is the rows' accumulator.
template <class Row, class Acc>
__device__ FPG_RARE void combine_some(const Rows& rows, const double* weights, Row* out, int64_t column, int64_t count,
                                      Range columns) {
  for_columns(column, count, columns, [&](int64_t n) {
    Acc sum = 0;
#pragma unroll 8
    for (int t = 0; t < rows.tasks; ++t) {
      sum = fused(static_cast<Acc>(weights[t]), static_cast<Acc>(widened(rows.row<Row>(t)[n])), sum);
    }
    round_to(out + n, sum);
  });
}

// An item's steps, backwards. `wide`: in float64.
template <class Row, int U, int R>
__device__ inline void combine_item(const CombineJob& job, const Item& item, const double* weights, bool wide,
                                    Kept kept, int64_t first_kept) {
  const Range steps = steps_of(job.plan, item.columns);
  for (int64_t step = steps.last - 1; step >= steps.first; --step) {
    const int64_t column = step * job.plan.step;
    const bool whole = job.rows.aligned && contains(item.columns, column, job.plan.step);
    const int64_t number = first_kept + step - item.slot * (job.plan.span / job.plan.step);
    Row* out = static_cast<Row*>(job.out);
    if (wide) {
      combine_some<Row, double>(job.rows, weights, out, column, job.plan.step, item.columns);
    } else if (whole) {
      combine_whole<Row, U, R>(job.rows, weights, out, column, kept, number);
    } else {
      combine_some<Row, Accumulator<Row>>(job.rows, weights, out, column, job.plan.step, item.columns);
    }
  }
}

// All items of a block. Shared memory at `weights`: T doubles.
template <class Row, int U, int R>
__device__ inline void combine_all(const CombineJob& job, double* weights) {
  const int64_t tasks = job.rows.tasks;
  int64_t segment = -1;
  bool wide = false;
  for (int64_t item = job.plan.items - 1 - block_index(); item >= 0; item -= blocks()) {
    const Item found = item_at(job.plan, job.rows.offsets, job.rows.segments, job.rows.width, item);
    if (found.segment != segment) {
      segment = found.segment;
      wide = take_weights(job.weights + segment * tasks, tasks, weights);
    }
    combine_item<Row, U, R>(job, found, weights, wide, {nullptr, 0}, 0);
  }
}

}  // namespace fpg
