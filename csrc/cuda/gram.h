// gram: the partial Gram matrices of items, and their sum.
//
// Up to 8 rows (and for float64 rows, by tiles of 8) a thread owns columns and multiplies all pairs of rows. Above, the
// tensor cores do: a lane's 16 bytes of a row are operand words as they lie in memory, since both operands are rows of
// J and place the columns alike. bf16 and fp16 products are exact there; fp32 numbers are split into two tf32 each, and
// of the four products the smallest is left out (2^-22 of the product).
#pragma once

#include "rows.h"

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

// Rows [tile_i * A, + A) by rows [tile_j * B, + B); B = 0 is the triangle of the first. Shared memory:
// column_tile_bytes.
FPG_HOST_DEVICE constexpr int column_tile_bytes(int a, int b) {
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

template <class Row, int A, int B, int U, class J>
__device__ inline void gram_columns(const GramJob<J>& job, int64_t item, int64_t tile_i, int64_t tile_j, Kept kept,
                                    int64_t first_kept) {
  using Acc = Accumulator<Row>;
  constexpr int kPairs = B == 0 ? A * (A + 1) / 2 : A * B;
  constexpr int kOthers = B == 0 ? 1 : B;
  constexpr int kProducts = U * kVector<Row>;
  static_assert(kIsDouble<Row> || kProducts <= kProductsOfLane, "a lane takes too many products in a step");
  constexpr int kStepsOfLane = kIsDouble<Row> ? 1 << 20 : kProductsOfLane / kProducts;

  const Item found = job.rows.item(job.plan, item);
  const auto& rows = job.rows.of(found);
  const Range steps = steps_of(job.plan, found.columns);
  WarpTotals<kPairs> totals = {};
  Acc lanes[kPairs] = {};
  int taken = 0;
  for (int64_t step = steps.first; step < steps.last; ++step) {
    const int64_t column = step * job.plan.step;
    const bool whole = rows.aligned && contains(found.columns, column, job.plan.step);
    if (whole) {
      Packed x[U][A];
      Packed y[U][kOthers];
      load_owned<Row>(rows, tile_i * A, column, x);
      if constexpr (B != 0) load_owned<Row>(rows, tile_j * B, column, y);
      const int64_t number = first_kept + step - found.slot * (job.plan.span / job.plan.step);
      if (number < kept.steps) kept.store(number, x);
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
    } else {
      for_columns(column, job.plan.step, found.columns, [&](int64_t n) {
        Acc a[A], b[kOthers] = {};
        load_column<Row>(rows, tile_i * A, n, a);
        if constexpr (B != 0) load_column<Row>(rows, tile_j * B, n, b);
        multiply_column<Acc, A, B>(a, b, lanes);
      });
    }
    if (++taken == kStepsOfLane || step + 1 == steps.last) {
      totals.template add_batch<0>(lanes);
#pragma unroll
      for (int k = 0; k < kPairs; ++k) lanes[k] = 0;
      taken = 0;
    }
  }

  double* sums = reinterpret_cast<double*>(shared_memory());
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

template <class Row>
constexpr Product kProductOf = Product::kTf32;
template <>
constexpr Product kProductOf<Half> = Product::kHalf;
template <>
constexpr Product kProductOf<BFloat> = Product::kBFloat;

// One slab of G groups of 8 rows as a lane holds it: 16 bytes of row g of each group.
template <class Row, int G, class J>
__device__ inline void load_slab(const J& rows, int64_t first_row, int64_t column, Range columns, bool whole,
                                 Packed (&x)[G]) {
  const int64_t g = thread_index() % 32 / 4;
  if (whole) {
#pragma unroll
    for (int group = 0; group < G; ++group) {
      const int64_t t = first_row + 8 * group + g;
      x[group] = rows.has(t) ? load_packed(rows.template row<Row>(t) + column) : zeros();
    }
  } else {
#pragma unroll
    for (int group = 0; group < G; ++group) {
      const int64_t t = first_row + 8 * group + g;
      x[group] = rows.has(t) ? load_some(rows.template row<Row>(t), column, columns) : zeros();
    }
  }
}

__device__ inline void split(const Packed& x, Packed& high, Packed& low) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    high.word[w] = round_to_tf32(bits_to_float(x.word[w]));
    low.word[w] = round_to_tf32(bits_to_float(x.word[w]) - bits_to_float(high.word[w]));
  }
}

// sums[r][n] += groups (2 r, 2 r + 1) of a by group n of b, over the words 2 h and 2 h + 1.
template <Product kProduct, int GA, int GB, bool kDiagonal>
__device__ inline void multiply_groups(const Packed (&a)[GA], const Packed (&b)[GB], int h,
                                       float (&sums)[GA / 2][GB][4]) {
#pragma unroll
  for (int r = 0; r < GA / 2; ++r) {
    const uint32_t left[4] = {a[2 * r].word[2 * h], a[2 * r + 1].word[2 * h], a[2 * r].word[2 * h + 1],
                              a[2 * r + 1].word[2 * h + 1]};
#pragma unroll
    for (int n = 0; n < GB; ++n) {
      if (kDiagonal && n > 2 * r + 1) continue;
      const uint32_t right[2] = {b[n].word[2 * h], b[n].word[2 * h + 1]};
      multiply_add<kProduct>(sums[r][n], left, right);
    }
  }
}

template <class Row, int GA, int GB, bool kDiagonal>
__device__ inline void multiply_slab(const Packed (&x)[GA], const Packed (&y)[GB], float (&sums)[GA / 2][GB][4]) {
  if constexpr (kProductOf<Row> == Product::kTf32) {
    Packed high[GA], low[GA], other_high[GB], other_low[GB];
#pragma unroll
    for (int group = 0; group < GA; ++group) split(x[group], high[group], low[group]);
#pragma unroll
    for (int group = 0; group < GB; ++group) split(y[group], other_high[group], other_low[group]);
    // Small products first: the sums are small then, and lose less.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      multiply_groups<Product::kTf32, GA, GB, kDiagonal>(low, other_high, h, sums);
      multiply_groups<Product::kTf32, GA, GB, kDiagonal>(high, other_low, h, sums);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) multiply_groups<Product::kTf32, GA, GB, kDiagonal>(high, other_high, h, sums);
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h) multiply_groups<kProductOf<Row>, GA, GB, kDiagonal>(x, y, h, sums);
  }
}

// Tiles of 8 GA rows. Shared memory: tensor_tile_bytes.
FPG_HOST_DEVICE constexpr int tensor_tile_bytes(int rows) { return rows * rows * static_cast<int>(sizeof(double)); }

template <class Row, int G, bool kDiagonal, class J>
__device__ inline void gram_tensor(const GramJob<J>& job, int64_t item, int64_t tile_i, int64_t tile_j) {
  constexpr int kTile = 8 * G;
  constexpr int64_t kSlab = 4 * kVector<Row>;
  // A slab of 16-bit rows has 32 products for each sum, two of fp32 rows.
  constexpr int kSlabsOfLane = kProductsOfLane / kSlab;
  static_assert(kSlabs % kSlabsOfLane == 0, "sums are flushed within a step");

  const Item found = job.rows.item(job.plan, item);
  const auto& rows = job.rows.of(found);
  const Range steps = steps_of(job.plan, found.columns);
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  double totals[G / 2][G][4] = {};
  float sums[G / 2][G][4] = {};
  for (int64_t step = steps.first; step < steps.last; ++step) {
    const int64_t first = step * job.plan.step + warp * (kSlabs * kSlab);
    const bool whole = rows.aligned && contains(found.columns, step * job.plan.step, job.plan.step);
    Packed x[kSlabs][G];
    if constexpr (kDiagonal) {
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        const int64_t column = first + slab * kSlab + lane % 4 * kVector<Row>;
        load_slab<Row>(rows, tile_i * kTile, column, found.columns, whole, x[slab]);
      }
    }
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      if constexpr (kDiagonal) {
        multiply_slab<Row, G, G, true>(x[slab], x[slab], sums);
      } else {
        const int64_t column = first + slab * kSlab + lane % 4 * kVector<Row>;
        Packed y[G];
        load_slab<Row>(rows, tile_i * kTile, column, found.columns, whole, x[0]);
        load_slab<Row>(rows, tile_j * kTile, column, found.columns, whole, y);
        multiply_slab<Row, G, G, false>(x[0], y, sums);
      }
      if ((slab + 1) % kSlabsOfLane != 0) continue;
#pragma unroll
      for (int r = 0; r < G / 2; ++r) {
#pragma unroll
        for (int n = 0; n < G; ++n) {
          if (kDiagonal && n > 2 * r + 1) continue;
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            totals[r][n][k] += static_cast<double>(sums[r][n][k]);
            sums[r][n][k] = 0;
          }
        }
      }
    }
  }

  // Warps add to the tile one after another.
  double* tile = reinterpret_cast<double*>(shared_memory());
  for (int turn = 0; turn < kWarps; ++turn) {
    if (turn == warp) {
#pragma unroll
      for (int r = 0; r < G / 2; ++r) {
#pragma unroll
        for (int n = 0; n < G; ++n) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            double* to = tile + (16 * r + lane / 4 + k / 2 * 8) * kTile + 8 * n + lane % 4 * 2 + k % 2;
            *to = turn == 0 ? totals[r][n][k] : *to + totals[r][n][k];
          }
        }
      }
    }
    sync_block();
  }
  double* partial = job.partials + item * pair_index(rows.tasks, 0);
  for (int k = thread_index(); k < kTile * kTile; k += kThreads) {
    store_pair(rows, {tile_i * kTile + k / kTile, tile_j * kTile + k % kTile}, tile[k], partial);
  }
  sync_block();
}

// One item and pair of tiles above 8 rows. G = 0: float64 rows.
template <class Row, int G, class J>
__device__ inline void gram_tile(const GramJob<J>& job, int64_t item, int64_t tile) {
  const Pair pair = pair_of(tile);
  const Kept nothing = {nullptr, 0};
  if (pair.i == pair.j) {
    if constexpr (G == 0) gram_columns<Row, 8, 0, 1>(job, item, pair.i, pair.j, nothing, 0);
    if constexpr (G != 0) gram_tensor<Row, G, true>(job, item, pair.i, pair.j);
  } else {
    if constexpr (G == 0) gram_columns<Row, 8, 8, 1>(job, item, pair.i, pair.j, nothing, 0);
    // Sixteen rows are one tile.
    if constexpr (G > 2) gram_tensor<Row, G, false>(job, item, pair.i, pair.j);
  }
}
template <int G>
constexpr int gram_tile_bytes() {
  return G == 0 ? column_tile_bytes(8, 8) : tensor_tile_bytes(8 * G);
}

}  // namespace fpg
