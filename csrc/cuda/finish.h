// What lies between the two passes over J: the sum of the partial Gram matrices, rows that fp32 could not hold, the
// T x T solve. A grid of any size does it; what a warp takes depends on nothing but its number. `grid.h`: one after the
// other.
#pragma once

#include "../fp32_range.h"
#include "../solvers/pcgrad.h"
#include "gram.h"
#include "warp_group.h"

namespace fpg {

enum Flag { kRight = 0, kRedo = 1, kRedoUnlessZero = 2 };

__device__ inline int flag_of(double squared_norm) {
  if (squared_norm == 0) return kRedoUnlessZero;  // a row of zeros, or an underflow
  return safe_squared_norm(squared_norm) ? kRight : kRedo;
}

__device__ inline bool any_flag(const int* flags, int64_t count) {
  bool found = false;
  for (int64_t k = thread_index(); k < count; k += kThreads) found = found || flags[k] != kRight;
  return any_in_block(found);
}

__device__ inline int64_t warp_of_grid() { return block_index() * kWarps + thread_index() / 32; }
__device__ inline int64_t warps_of_grid() { return blocks() * kWarps; }

// Partial Gram matrices to G. `again`: only the problems with a flag, which stay as they are.
template <class J>
__device__ inline void reduce(const GramJob<J>& job, bool again) {
  const int64_t tasks = job.rows.tasks, pairs = pair_index(tasks, 0);
  const int lane = thread_index() % 32;
  for (int64_t task = warp_of_grid(); task < job.rows.problems * pairs; task += warps_of_grid()) {
    const int64_t s = task / pairs, index = task % pairs;
    if (again) {
      bool flagged = false;
      for (int64_t t = 0; t < tasks; ++t) flagged = flagged || job.flags[s * tasks + t] != kRight;
      if (!flagged) continue;
    }
    const Range items = job.rows.items(job.plan, s);
    double sum = 0;
#pragma unroll 8
    for (int64_t item = items.first + lane; item < items.last; item += 32) sum += job.partials[item * pairs + index];
    sum = warp_sum(sum);
    if (lane != 0) continue;
    const Pair pair = pair_of(index);
    double* gram = job.gram + s * tasks * tasks;
    gram[pair.i * tasks + pair.j] = sum;
    gram[pair.j * tasks + pair.i] = sum;
    if (job.guarded && !again && pair.i == pair.j) job.flags[s * tasks + pair.i] = flag_of(sum);
  }
}

template <class Row>
__device__ inline bool has_nonzero(const Row* row, Range columns) {
  bool found = false;
  for (int64_t n = columns.first + thread_index(); n < columns.last; n += kThreads)
    found = found || widened(row[n]) != 0;
  return any_in_block(found);
}

// Redoes an item's products of flagged rows in float64. A row that is all zeros in the item is right as it is: an
// absent task costs one row's bytes.
template <class Row, class J>
__device__ inline void rescue(const GramJob<J>& job, int64_t item) {
  const Item found = job.rows.item(job.plan, item);
  const auto& rows = job.rows.of(found);
  const int64_t tasks = rows.tasks;
  const int* flags = job.flags + job.rows.problem_of(found) * tasks;
  double* partial = job.partials + item * pair_index(tasks, 0);
  const int lane = thread_index() % 32;
  for (int64_t t = 0; t < tasks; ++t) {
    const Row* row = rows.template row<Row>(t);
    if (flags[t] == kRight || !rows.has(t) || (flags[t] == kRedoUnlessZero && !has_nonzero(row, found.columns)))
      continue;
    for (int64_t other = thread_index() / 32; other < tasks; other += kWarps) {
      if (other > t && flags[other] == kRedo) continue;  // which does this pair itself
      if (!rows.has(other)) continue;
      const Row* beside = rows.template row<Row>(other);
      double sum = 0;
      for (int64_t n = found.columns.first + lane; n < found.columns.last; n += 32) {
        sum = fused(static_cast<double>(widened(row[n])), static_cast<double>(widened(beside[n])), sum);
      }
      sum = warp_sum(sum);
      if (lane == 0) partial[other < t ? pair_index(t, other) : pair_index(other, t)] = sum;
    }
  }
}

// An order of few tasks that lies in the host's memory travels with the launch: a copy would have to be page-locked,
// kept and waited for by the device, and takes longer than the solve.
constexpr int kMostTasksGiven = 16;
struct OrderedJob : SolveJob {
  bool given;  // `places` for all problems, in the place of `order`
  uint8_t places[kMostTasksGiven * kMostTasksGiven];
};

// The order of a problem, or of a row from `first` on.
struct Order {
  const int64_t* order;
  const uint8_t* places;  // null: `order`

  __device__ int64_t operator[](int64_t k) const { return places == nullptr ? order[k] : places[k]; }
  __device__ Order from(int64_t first) const { return {order + first, places == nullptr ? nullptr : places + first}; }
};
__device__ inline Order order_of(const OrderedJob& job, int64_t problem) {
  return {job.order + (job.order_per_problem ? problem * job.tasks * job.tasks : 0), job.given ? job.places : nullptr};
}

// Row i of a problem's C by a warp; `gram` is the problem's, `order` the row's. Shared memory for each warp: T doubles.
template <class Places>
__device__ inline void solve_row(const OrderedJob& job, const double* gram, const Places& order, int64_t i,
                                 double* coefficients, double* dots) {
  const WarpGroup group = {thread_index() % 32};
  group.sync();  // the row before is done with `dots`
  project_row(group, gram, order, job.tasks, i, job.projection, coefficients, dots);
}

__device__ inline void solve(const OrderedJob& job) {
  const int64_t tasks = job.tasks, square = tasks * tasks;
  double* dots = reinterpret_cast<double*>(shared_memory()) + thread_index() / 32 * tasks;
  for (int64_t row = warp_of_grid(); row < job.problems * tasks; row += warps_of_grid()) {
    const int64_t s = row / tasks;
    const int64_t i = row % tasks;
    const Order order = order_of(job, s).from(i * tasks);
    solve_row(job, job.gram + s * square, order, i, job.coefficients + row * tasks, dots);
  }
}

__device__ inline void merge_weights(const OrderedJob& job) {
  const int64_t tasks = job.tasks;
  for (int64_t k = block_index() * kThreads + thread_index(); k < job.problems * tasks; k += blocks() * kThreads) {
    job.weights[k] = merged_weight(job.coefficients + k / tasks * tasks * tasks, tasks, k % tasks, job.scale);
  }
}

constexpr int solve_bytes(int64_t tasks) { return kWarps * static_cast<int>(tasks * sizeof(double)); }

}  // namespace fpg
