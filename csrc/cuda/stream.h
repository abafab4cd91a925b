// Rows on their way from the device's memory to shared memory, ahead of the arithmetic.
#pragma once

#include "rows.h"

namespace fpg {

// Steps in shared memory, `kEach` vectors of 16 bytes for each thread: the next ones on their way, and the last ones
// still there for the second pass. Steps are numbered in the order in which a block takes them. kAhead are under way
// while one is multiplied; the stage of one more is free to be overwritten, so that no copy meets a read of its stage.
template <int kEach, int kStepsAhead = 2>
struct Ring {
  Packed* vectors;

  static constexpr int kVectors = kEach, kAhead = kStepsAhead, kStages = kAhead + 1;
  static constexpr int kBytes = kStages * kEach * kThreads * static_cast<int>(sizeof(Packed));

  __device__ Packed* stage(int number) const {
    return vectors + static_cast<int>(static_cast<unsigned>(number) % kStages) * (kEach * kThreads);
  }
};

// The steps of a block from number `from` on, left in its ring.
template <int kEach>
struct Kept {
  Ring<kEach> ring;
  int from;

  __device__ bool has(int number) const { return number >= from; }
};
constexpr int kNever = INT32_MAX;

// Calls request(k, stage), which fills a stage with step k of `count`, the ring's kAhead steps before take(k, stage),
// which reads it. `sync` joins the threads that read what others asked for.
template <class Steps, class Sync, class Request, class Take>
__device__ inline void stream_steps(Steps ring, int first_number, int count, Sync sync, Request request, Take take) {
  for (int k = -Steps::kAhead; k < count; ++k) {
    wait_for_copies<Steps::kAhead - 1>();
    sync();
    if (k + Steps::kAhead < count) request(k + Steps::kAhead, ring.stage(first_number + k + Steps::kAhead));
    commit_copies();
    if (k >= 0) take(k, ring.stage(first_number + k));
  }
}

// One vector of a row whose columns need not all belong to an item, or which is not aligned; zero where they do not.
template <class Row>
__device__ inline void request_some(const Row* row, int64_t first, Range columns, Packed* to) {
  const Part part = part_of_vector<Row>(first, columns);
  Row* elements = reinterpret_cast<Row*>(to);
#pragma unroll
  for (int v = 0; v < kVector<Row>; ++v) {
    if constexpr (sizeof(Row) < 4) {
      elements[v] = part.has(v) ? row[first + v] : Row{};
    } else {
      copy_ahead<sizeof(Row)>(elements + v, row + first + v, part.has(v));
    }
  }
}

// As load_owned, to the thread's places in a stage of a ring.
template <class Row, int U, int R, class J>
__device__ inline void request_owned(const J& rows, int64_t first_row, int64_t step_column, Range columns, bool whole,
                                     Packed* own) {
  const int64_t column = step_column + thread_index() * kVector<Row>;
  if (whole) {
    Row* row = rows.template row<Row>(first_row);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (r > 0) row = rows.below(row, first_row + r - 1, 1);
      const bool there = rows.has(first_row + r);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        copy_ahead<16>(own + (u * R + r) * kThreads, row + column + u * (kThreads * kVector<Row>), there);
      }
    }
  } else {
#pragma unroll 1
    for (int k = 0; k < U * R; ++k) {
      const int64_t t = first_row + k % R;
      request_some(rows.template row<Row>(t), column + k / R * (kThreads * kVector<Row>),
                   rows.has(t) ? columns : Range{0, 0}, own + k * kThreads);
    }
  }
}

template <int U, int R>
__device__ inline void read_owned(const Packed* own, Packed (&x)[U][R]) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int r = 0; r < R; ++r) x[u][r] = own[(u * R + r) * kThreads];
  }
}

}  // namespace fpg
