// combine: w J, last columns first: the pass before read those last, and they are in the cache.
//
// A thread owns columns: it reads them of all rows before it writes them, so `out` may be one of the rows.
#pragma once

#include "../fp32_range.h"
#include "stream.h"

namespace fpg {

template <class J>
struct CombineJob {
  J rows;
  Plan plan;
  const double* weights;  // [problems, T]
};

// Copies weights into shared memory as they will be multiplied; whether one of them asks for float64. For all threads
// of a block. Where not counts(k) the weight is zero.
template <class Acc, class Counts>
__device__ inline bool take_weights(const double* from, int64_t count, Acc* to, Counts counts) {
  bool unsafe = false;
  sync_block();  // the weights before are done with
  for (int64_t k = thread_index(); k < count; k += kThreads) {
    const double weight = counts(k) ? from[k] : 0;
    to[k] = static_cast<Acc>(weight);
    unsafe = unsafe || unsafe_weight(weight);
  }
  return any_in_block(unsafe);
}
template <class Acc>
__device__ inline bool take_weights(const double* from, int64_t count, Acc* to) {
  return take_weights(from, count, to, [](int64_t) { return true; });
}

// sums += rows [first, first + R) of one vector, each times its weight.
template <class Row, int R, class Weight>
__device__ inline void add_weighted(const Packed (&x)[R], const Weight* weights, int64_t first, int tasks,
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
template <class Row, int U, int R, class J, class Weight>
__device__ inline void combine_whole(const J& rows, const Weight* weights, int64_t column, Kept<U * R> kept,
                                     int number) {
  Row* own = static_cast<Row*>(rows.out) + column + thread_index() * kVector<Row>;
  Packed x[U][R];
  if (kept.has(number)) {
    read_owned(kept.ring.stage(number) + thread_index(), x);
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

// Any step, some columns of a thread at a time; with the roundings of a whole one if Acc is the rows' accumulator.
constexpr int kColumnsAtATime = 4;
template <class Row, class Acc, class J, class Weight>
__device__ FPG_RARE void combine_some(J rows, const Weight* weights, int64_t column, int64_t count, Range columns) {
  const int64_t end = column + count < columns.last ? column + count : columns.last;
#pragma unroll 1
  for (int64_t n = column + thread_index(); n < end; n += kColumnsAtATime * kThreads) {
    Acc sums[kColumnsAtATime] = {};
    const auto is_ours = [&](int k) { return n + k * kThreads >= columns.first && n + k * kThreads < end; };
#pragma unroll 2
    for (int t = 0; t < rows.tasks; ++t) {
      if (!rows.has(t)) continue;
#pragma unroll
      for (int k = 0; k < kColumnsAtATime; ++k) {
        const Acc x = is_ours(k) ? static_cast<Acc>(widened(rows.template row<Row>(t)[n + k * kThreads])) : 0;
        sums[k] = fused(static_cast<Acc>(weights[t]), x, sums[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kColumnsAtATime; ++k) {
      if (is_ours(k)) round_to(static_cast<Row*>(rows.out) + n + k * kThreads, sums[k]);
    }
  }
}

// An item's steps, backwards. `exact`: the weights in float64, if they ask for it.
template <class Row, int U, int R, class J, class Weight>
__device__ inline void combine_item(const J& rows, const Plan& plan, const Item& item, const Weight* weights,
                                    const double* exact, Kept<U * R> kept, int first_number) {
  const Range steps = steps_of(plan, item.columns);
  for (int64_t step = steps.last - 1; step >= steps.first; --step) {
    const int64_t column = step * plan.step;
    const bool whole = rows.aligned && contains(item.columns, column, plan.step);
    const int number = first_number + static_cast<int>(step - item.slot * (plan.span / plan.step));
    if (exact != nullptr) {
      combine_some<Row, double>(rows, exact, column, plan.step, item.columns);
    } else if (whole) {
      combine_whole<Row, U, R>(rows, weights, column, kept, number);
    } else {
      combine_some<Row, Accumulator<Row>>(rows, weights, column, plan.step, item.columns);
    }
  }
}

// All items of a block. Shared memory at `weights`: T numbers. A task without a row in an item has no weight there.
template <class Row, int U, int R, class J, class Weight>
__device__ inline void combine_all(const CombineJob<J>& job, Weight* weights) {
  const int64_t tasks = job.rows.tasks;
  int64_t segment = -1;
  const double* exact = nullptr;
  for (int64_t item = job.plan.items - 1 - block_index(); item >= 0; item -= blocks()) {
    const Item found = job.rows.item(job.plan, item);
    const auto& rows = job.rows.of(found);
    if (found.segment != segment) {
      segment = found.segment;
      const double* given = job.weights + job.rows.problem_of(found) * tasks;
      exact = take_weights(given, tasks, weights, [&](int64_t t) { return rows.has(t); }) ? given : nullptr;
    }
    combine_item<Row, U, R>(rows, job.plan, found, weights, exact, {{nullptr}, kNever}, 0);
  }
}

}  // namespace fpg
