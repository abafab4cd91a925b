// gram: the partial Gram matrices of items. Up to 8 rows (and for float64 rows, by tiles of 8) a thread owns columns
// and multiplies all pairs of rows; gram_tensor.h has the others.
#pragma once

#include "stream.h"

namespace fpg {

template <class J>
struct GramJob {
  J rows;
  Plan plan;
  double* partials;  // [items, T (T + 1) / 2]
  int* flags;        // [problems, T]
  double* gram;      // [problems, T, T]
  bool guarded;      // squares can leave fp32's range
};

// Lane l gets the sum over the warp of value l >> (5 - log2 kCount): half of the values change hands in each step.
// A template for each step, so that all places in `values` are constants.
template <int kCount, int kMask = 16>
__device__ inline double fold(const double (&values)[kCount]) {
  if constexpr (kMask == 0) {
    return values[0];
  } else if constexpr (kCount == 1) {
    const double sum[1] = {values[0] + shuffle_xor(values[0], kMask)};
    return fold<1, kMask / 2>(sum);
  } else {
    const bool upper = (thread_index() & kMask) != 0;
    double half[kCount / 2];
#pragma unroll
    for (int k = 0; k < kCount / 2; ++k) {
      const double sent = upper ? values[k] : values[k + kCount / 2];
      half[k] = (upper ? values[k + kCount / 2] : values[k]) + shuffle_xor(sent, kMask);
    }
    return fold<kCount / 2, kMask / 2>(half);
  }
}

FPG_HOST_DEVICE constexpr int power_of_two_from(int count) {
  return count <= 1 ? 1 : 2 * power_of_two_from((count + 1) / 2);
}

// Sums over a warp of up to 32 values a batch, in float64: each lane holds one total of each batch.
template <int kCount>
struct WarpTotals {
  static constexpr int kBatches = (kCount + 31) / 32;
  double totals[kBatches];

  template <int kBatch, class Acc>
  __device__ void add_batch(const Acc (&values)[kCount]) {
    constexpr int kFirst = 32 * kBatch, kRest = kCount - kFirst < 32 ? kCount - kFirst : 32;
    constexpr int kPadded = power_of_two_from(kRest);
    double wide[kPadded];
#pragma unroll
    for (int k = 0; k < kPadded; ++k)
      wide[k] = k < kRest ? static_cast<double>(values[kFirst + (k < kRest ? k : 0)]) : 0;
    totals[kBatch] += fold(wide);
    if constexpr (kBatch + 1 < kBatches) add_batch<kBatch + 1>(values);
  }

  template <int kBatch>
  __device__ void store_batch(double* to) const {
    constexpr int kFirst = 32 * kBatch, kRest = kCount - kFirst < 32 ? kCount - kFirst : 32;
    constexpr int kShare = 32 / power_of_two_from(kRest);
    const int lane = thread_index() % 32;
    if (lane % kShare == 0 && lane / kShare < kRest) to[kFirst + lane / kShare] = totals[kBatch];
    if constexpr (kBatch + 1 < kBatches) store_batch<kBatch + 1>(to);
  }
};

// One entry of a partial Gram matrix. With a row that is not there it is zero, even if the other holds an inf.
template <class J>
__device__ inline void store_pair(const J& rows, Pair pair, double sum, double* partial) {
  if (pair.i >= rows.tasks || pair.j > pair.i) return;
  partial[pair_index(pair.i, pair.j)] = rows.has(pair.i) && rows.has(pair.j) ? sum : 0;
}

// Writes sums [kWarps][count] of a tile, warps added in order, to a partial Gram matrix. pair(k) are the rows that
// number k of the tile belongs to.
template <class J, class PairOf>
__device__ inline void store_tile(const J& rows, const double* sums, int count, double* partial, PairOf pair) {
  for (int k = thread_index(); k < count; k += kThreads) {
    double sum = sums[k];
    for (int warp = 1; warp < kWarps; ++warp) sum += sums[warp * count + k];
    store_pair(rows, pair(k), sum, partial);
  }
}

// Vectors that a thread has of a step: of rows [tile_i * A, + A), and of rows [tile_j * B, + B); B = 0 is the triangle
// of the first.
FPG_HOST_DEVICE constexpr int column_vectors(int a, int b, int u) { return u * (a + b); }
FPG_HOST_DEVICE constexpr int column_sums_bytes(int a, int b) {
  return kWarps * (b == 0 ? a * (a + 1) / 2 : a * b) * static_cast<int>(sizeof(double));
}

// lanes += the products of one column: a with itself, the lower triangle, or a with b.
template <class Acc, int A, int B, int kPairs>
__device__ inline void multiply_column(const Acc (&a)[A], const Acc (&b)[B == 0 ? 1 : B], Acc (&lanes)[kPairs]) {
  if constexpr (B == 0) {
#pragma unroll
    for (int i = 0; i < A; ++i) {
#pragma unroll
      for (int j = 0; j <= i; ++j) lanes[i * (i + 1) / 2 + j] = fused(a[i], a[j], lanes[i * (i + 1) / 2 + j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < A; ++i) {
#pragma unroll
      for (int j = 0; j < B; ++j) lanes[i * B + j] = fused(a[i], b[j], lanes[i * B + j]);
    }
  }
}

// kStreamed: by `ring`, where the first step of the item's slot has number `first_number`; else from memory as it is
// asked for. Shared memory at `sums`: column_sums_bytes.
template <class Row, int A, int B, int U, bool kStreamed, class J>
__device__ inline void gram_columns(const GramJob<J>& job, int64_t item, int64_t tile_i, int64_t tile_j, double* sums,
                                    Ring<column_vectors(A, B, U)> ring, int first_number) {
  using Acc = Accumulator<Row>;
  constexpr int kPairs = B == 0 ? A * (A + 1) / 2 : A * B;
  constexpr int kOthers = B == 0 ? 1 : B;
  constexpr int kProducts = U * kVector<Row>;
  static_assert(kIsDouble<Row> || kProducts <= kProductsOfLane, "a lane takes too many products in a step");
  constexpr int kStepsOfLane = kIsDouble<Row> ? 1 << 20 : kProductsOfLane / kProducts;

  const Item found = job.rows.item(job.plan, item);
  const auto& rows = job.rows.of(found);
  const Range steps = steps_of(job.plan, found.columns);
  const int count = static_cast<int>(steps.last - steps.first);
  const auto column_of = [&](int k) { return (steps.first + k) * job.plan.step; };
  const auto is_whole = [&](int k) { return rows.aligned && contains(found.columns, column_of(k), job.plan.step); };
  WarpTotals<kPairs> totals = {};
  Acc lanes[kPairs] = {};
  int taken = 0;
  const auto multiply = [&](int k, const Packed(&x)[U][A], const Packed(&y)[U][kOthers]) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int v = 0; v < kVector<Row>; ++v) {
        Acc a[A], b[kOthers] = {};
#pragma unroll
        for (int i = 0; i < A; ++i) a[i] = element<Row>(x[u][i], v);
        if constexpr (B != 0) {
#pragma unroll
          for (int j = 0; j < B; ++j) b[j] = element<Row>(y[u][j], v);
        }
        multiply_column<Acc, A, B>(a, b, lanes);
      }
    }
    if (++taken < kStepsOfLane && k + 1 < count) return;
    totals.template add_batch<0>(lanes);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) lanes[pair] = 0;
    taken = 0;
  };
  if constexpr (kStreamed) {
    const auto request = [&](int k, Packed* stage) {
      Packed* own = stage + thread_index();
      request_owned<Row, U, A>(rows, tile_i * A, column_of(k), found.columns, is_whole(k), own);
      if constexpr (B != 0) {
        request_owned<Row, U, B>(rows, tile_j * B, column_of(k), found.columns, is_whole(k), own + U * A * kThreads);
      }
    };
    const auto take = [&](int k, const Packed* stage) {
      Packed x[U][A], y[U][kOthers];
      read_owned(stage + thread_index(), x);
      if constexpr (B != 0) read_owned(stage + thread_index() + U * A * kThreads, y);
      multiply(k, x, y);
    };
    const int64_t before = steps.first - found.slot * (job.plan.span / job.plan.step);  // steps of the slot
    stream_steps(ring, first_number + static_cast<int>(before), count, [] {}, request, take);
  } else {
    for (int k = 0; k < count; ++k) {
      Packed x[U][A], y[U][kOthers];
      load_owned<Row>(rows, tile_i * A, column_of(k), found.columns, is_whole(k), x);
      if constexpr (B != 0) load_owned<Row>(rows, tile_j * B, column_of(k), found.columns, is_whole(k), y);
      multiply(k, x, y);
    }
  }

  totals.template store_batch<0>(sums + thread_index() / 32 * kPairs);
  sync_block();
  store_tile(rows, sums, kPairs, job.partials + item * pair_index(rows.tasks, 0), [=](int k) -> Pair {
    if constexpr (B == 0) {
      const Pair pair = pair_of(k);
      return {tile_i * A + pair.i, tile_i * A + pair.j};
    } else {
      return {tile_i * A + k / B, tile_j * B + k % B};
    }
  });
  sync_block();
}

}  // namespace fpg
