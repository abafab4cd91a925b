// combine: w J, last columns first: the pass before read those last, and they are in the cache.
//
// A thread owns columns: it reads them of all rows before it writes them, so `out` may be one of the rows.
#pragma once

#include "rows.h"

namespace fpg {

template <class J>
struct CombineJob {
  J rows;
  Plan plan;
  const double* weights;  // [problems, T]
};

// Rounded to fp32 and multiplied with fp32 elements, such a weight would lose its meaning.
__device__ inline bool unsafe_weight(double weight) {
  const double magnitude = weight < 0 ? -weight : weight;
  return magnitude > kSafeWeightMax || (magnitude < kSafeWeightMin && magnitude != 0);
}

// Copies weights into shared memory; whether one of them asks for float64. For all threads of a block. Where not
// counts(k) the weight is zero.
template <class Counts>
__device__ inline bool take_weights(const double* from, int64_t count, double* to, Counts counts) {
  bool unsafe = false;
  sync_block();  // the weights before are done with
  for (int64_t k = thread_index(); k < count; k += kThreads) {
    const double weight = counts(k) ? from[k] : 0;
    to[k] = weight;
    unsafe = unsafe || unsafe_weight(weight);
  }
  return any_in_block(unsafe);
}
__device__ inline bool take_weights(const double* from, int64_t count, double* to) {
  return take_weights(from, count, to, [](int64_t) { return true; });
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
template <class Row, int U, int R, class J>
__device__ inline void combine_whole(const J& rows, const double* weights, int64_t column, Kept kept, int64_t number) {
  Row* own = static_cast<Row*>(rows.out) + column + thread_index() * kVector<Row>;
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
template <class Row, class Acc, class J>
__device__ FPG_RARE void combine_some(J rows, const double* weights, int64_t column, int64_t count, Range columns) {
  for_columns(column, count, columns, [&](int64_t n) {
    Acc sum = 0;
#pragma unroll 8
    for (int t = 0; t < rows.tasks; ++t) {
      sum = fused(static_cast<Acc>(weights[t]), static_cast<Acc>(element_of<Row>(rows, t, n)), sum);
    }
    round_to(static_cast<Row*>(rows.out) + n, sum);
  });
}

// An item's steps, backwards. `wide`: in float64.
template <class Row, int U, int R, class J>
__device__ inline void combine_item(const J& rows, const Plan& plan, const Item& item, const double* weights, bool wide,
                                    Kept kept, int64_t first_kept) {
  const Range steps = steps_of(plan, item.columns);
  for (int64_t step = steps.last - 1; step >= steps.first; --step) {
    const int64_t column = step * plan.step;
    const bool whole = rows.aligned && contains(item.columns, column, plan.step);
    const int64_t number = first_kept + step - item.slot * (plan.span / plan.step);
    if (wide) {
      combine_some<Row, double>(rows, weights, column, plan.step, item.columns);
    } else if (whole) {
      combine_whole<Row, U, R>(rows, weights, column, kept, number);
    } else {
      combine_some<Row, Accumulator<Row>>(rows, weights, column, plan.step, item.columns);
    }
  }
}

// All items of a block. Shared memory at `weights`: T doubles. A task without a row in an item has no weight there.
template <class Row, int U, int R, class J>
__device__ inline void combine_all(const CombineJob<J>& job, double* weights) {
  const int64_t tasks = job.rows.tasks;
  int64_t segment = -1;
  bool wide = false;
  for (int64_t item = job.plan.items - 1 - block_index(); item >= 0; item -= blocks()) {
    const Item found = job.rows.item(job.plan, item);
    const auto& rows = job.rows.of(found);
    if (found.segment != segment) {
      segment = found.segment;
      wide = take_weights(job.weights + job.rows.problem_of(found) * tasks, tasks, weights,
                          [&](int64_t t) { return rows.has(t); });
    }
    combine_item<Row, U, R>(rows, job.plan, found, weights, wide, {nullptr, 0}, 0);
  }
}

}  // namespace fpg
