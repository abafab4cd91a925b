// gram: one chunk of columns, all pairs of rows (lower triangle).
//
// Register tiles of kTile x kTile row pairs run over a block of columns that stays cached. At the end of each block the
// lanes of a tile go to float64 sums, of which each pair has one vector.
//
// fp32 and fp64 rows are read where they lie. Rows of another type than the accumulator's are packed first, block by
// block, so that they are converted once instead of once for each tile.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fpg {
namespace FPG_ISA {

// Vectors between two flushes of fp32 lanes to float64. A lane that holds one large product loses up to half of its
// last place with each further one: 32 of them stay within 1e-6 of the sum of the squares.
constexpr int64_t kGramSteps = 32;
constexpr int64_t kGramBlockBytes = 1 << 18;  // of a block of all rows: within the second-level cache

// What a tile asks for of the next block of rows: `count` of them, `bytes` behind each row's first. Every tile has its
// share, so that the memory works all the while that the core multiplies.
struct Ahead {
  const void* const* rows;
  int64_t count;
  int64_t bytes;
  int64_t bytes_per_step;  // that a tile's step over one vector of the current block stands for
};

constexpr int kMostAhead = 3;  // from two bands of tiles on there are at least three tiles for 2 kTile rows
static_assert(2 * kTile <= 3 * kMostAhead);

// sums[r][c] += lanes of a_r * b_c over `columns` from `first`, a multiple of the lanes; for a diagonal tile a = b and
// c <= r.
template <class Acc, int R, int C, bool kDiagonal, int kAhead>
inline void gram_tile(const void* const* a, const void* const* b, int64_t first, int64_t columns, const Ahead& ahead,
                      Vector<double>* const* sums) {
  Vector<Acc> lanes[R][C] = {};
  const Acc *row_a[R], *row_b[C];
  const char* row_ahead[kMostAhead];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row_a[r] = static_cast<const Acc*>(a[r]) + first;
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) row_b[c] = kDiagonal ? row_a[c] : static_cast<const Acc*>(b[c]) + first;
#pragma GCC unroll 8
  for (int r = 0; r < kAhead; ++r) row_ahead[r] = static_cast<const char*>(ahead.rows[r]);
  int64_t next = ahead.bytes;
  for (int64_t n = 0; n < columns; n += kLanes<Acc>) {
#pragma GCC unroll 8
    for (int r = 0; r < kAhead; ++r) __builtin_prefetch(row_ahead[r] + next, 0, 2);
    next += ahead.bytes_per_step;
    Vector<Acc> x[R], y[C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = load(row_a[r] + n, Acc());
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) y[c] = kDiagonal ? x[c] : load(row_b[c] + n, Acc());
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < (kDiagonal ? r + 1 : C); ++c) lanes[r][c] += x[r] * y[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < (kDiagonal ? r + 1 : C); ++c) sums[r][c] += widen(lanes[r][c]);
  }
}

// A tile of R rows; below the diagonal it is kTile wide, since only the last band of rows can be narrower.
template <class Acc, int R, int kAhead>
inline void gram_tile_of(bool diagonal, const void* const* a, const void* const* b, int64_t first, int64_t columns,
                         const Ahead& ahead, Vector<double>* const* sums) {
  if (diagonal) {
    gram_tile<Acc, R, R, true, kAhead>(a, a, first, columns, ahead, sums);
  } else {
    gram_tile<Acc, R, kTile, false, kAhead>(a, b, first, columns, ahead, sums);
  }
}

template <class Acc, int R>
inline void gram_tile_ahead(bool diagonal, const void* const* a, const void* const* b, int64_t first, int64_t columns,
                            const Ahead& ahead, Vector<double>* const* sums) {
  switch (ahead.count) {
    case 0: return gram_tile_of<Acc, R, 0>(diagonal, a, b, first, columns, ahead, sums);
    case 1: return gram_tile_of<Acc, R, 1>(diagonal, a, b, first, columns, ahead, sums);
    case 2: return gram_tile_of<Acc, R, 2>(diagonal, a, b, first, columns, ahead, sums);
    default: return gram_tile_of<Acc, R, kMostAhead>(diagonal, a, b, first, columns, ahead, sums);
  }
}

// `ahead` has all rows.
template <class Acc>
inline void gram_block(const void* const* rows, int64_t tasks, int64_t first, int64_t columns, Ahead ahead,
                       Vector<double>* sums) {
  const int64_t bands = (tasks + kTile - 1) / kTile, tiles = bands * (bands + 1) / 2;
  int64_t begun = 0, asked = 0;
  for (int64_t i = 0; i < tasks; i += kTile) {
    const int64_t height = tasks - i < kTile ? tasks - i : kTile;
    for (int64_t j = 0; j <= i; j += kTile) {
      Vector<double>* tile[kTile];
      for (int64_t r = 0; r < height; ++r) tile[r] = sums + (i + r) * (i + r + 1) / 2 + j;
      const void *const *a = rows + i, *const *b = rows + j;
      const int64_t until = tiles == 1 ? 0 : tasks * ++begun / tiles;  // a single tile streams well by itself
      const Ahead own{ahead.rows + asked, until - asked, ahead.bytes, ahead.bytes_per_step};
      asked = until;
      switch (height) {
        case 1: gram_tile_ahead<Acc, 1>(i == j, a, b, first, columns, own, tile); break;
        case 2: gram_tile_ahead<Acc, 2>(i == j, a, b, first, columns, own, tile); break;
        case 3: gram_tile_ahead<Acc, 3>(i == j, a, b, first, columns, own, tile); break;
        default: gram_tile_ahead<Acc, kTile>(i == j, a, b, first, columns, own, tile);
      }
    }
  }
}

template <class Acc>
inline int64_t gram_block_columns(int64_t tasks) {
  const int64_t columns = kGramBlockBytes / (tasks * static_cast<int64_t>(sizeof(Acc))) / kLanes<Acc> * kLanes<Acc>;
  if (columns < kLanes<Acc>) return kLanes<Acc>;
  return columns > kGramSteps * kLanes<Acc> ? kGramSteps * kLanes<Acc> : columns;
}

// One row's `columns` elements as accumulators, padded with zeros to whole vectors.
template <class Acc, class Row>
inline void pack(const Row* from, int64_t columns, Acc* to) {
  const int64_t whole = columns / kLanes<Acc> * kLanes<Acc>;
  for (int64_t n = 0; n < whole; n += kLanes<Acc>) store_unaligned(to + n, load(from + n, Acc()));
  if (whole < columns) {
    Row padded[kLanes<Acc>] = {};
    __builtin_memcpy(padded, from + whole, (columns - whole) * sizeof(Row));
    store_unaligned(to + whole, load(padded, Acc()));
  }
}

// Scratch: the float64 sums, a packed block, and where its rows begin.
inline int64_t gram_scratch(int64_t tasks) {
  const int64_t narrow = gram_block_columns<float>(tasks) * static_cast<int64_t>(sizeof(float));
  const int64_t wide = gram_block_columns<double>(tasks) * static_cast<int64_t>(sizeof(double));
  const int64_t packed = tasks * (narrow > wide ? narrow : wide);
  return tasks * (tasks + 1) / 2 * kVectorBytes + packed + tasks * static_cast<int64_t>(sizeof(void*));
}

template <class Row, class Acc>
constexpr bool kSameType = false;
template <class Acc>
constexpr bool kSameType<Acc, Acc> = true;

// One block: where it lies if its type is the accumulator's and it fills vectors, else packed.
template <class Acc, class Row>
inline void gram_of(const void* const* rows, int64_t tasks, int64_t first, int64_t columns, Acc* packed,
                    const void** packed_rows, Vector<double>* sums) {
  const int64_t size = sizeof(Row);
  const Ahead ahead{rows, tasks, (first + columns) * size, kLanes<Acc> * size};
  if constexpr (kSameType<Row, Acc>) {
    if (columns % kLanes<Acc> == 0) return gram_block<Acc>(rows, tasks, first, columns, ahead, sums);
  }
  const int64_t padded = (columns + kLanes<Acc> - 1) / kLanes<Acc> * kLanes<Acc>;
  for (int64_t t = 0; t < tasks; ++t) {
    pack<Acc>(static_cast<const Row*>(rows[t]) + first, columns, packed + t * padded);
    packed_rows[t] = packed + t * padded;
  }
  gram_block<Acc>(packed_rows, tasks, 0, padded, ahead, sums);
}

template <class Row, class Acc>
void gram(const void* const* rows, int64_t tasks, Chunk chunk, double* partial, void* scratch) {
  const int64_t pairs = tasks * (tasks + 1) / 2;
  Vector<double>* sums = static_cast<Vector<double>*>(scratch);
  for (int64_t pair = 0; pair < pairs; ++pair) sums[pair] = Vector<double>{};

  Acc* packed = reinterpret_cast<Acc*>(sums + pairs);
  const int64_t block = gram_block_columns<Acc>(tasks);
  const void** packed_rows = reinterpret_cast<const void**>(packed + tasks * block);
  for (int64_t first = chunk.first; first < chunk.last; first += block) {
    const int64_t columns = chunk.last - first < block ? chunk.last - first : block;
    gram_of<Acc, Row>(rows, tasks, first, columns, packed, packed_rows, sums);
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    double sum = 0;
    for (int lane = 0; lane < kDoubles; ++lane) sum += sums[pair][lane];
    partial[pair] = sum;
  }
}

template <class Row>
bool any_nonzero(const void* row, int64_t width) {
  const Row* values = static_cast<const Row*>(row);
  constexpr int64_t kBlock = 1024;
  for (int64_t done = 0; done < width; done += kBlock) {
    const int64_t end = done + kBlock < width ? done + kBlock : width;
    bool found = false;
    for (int64_t n = done; n < end; ++n) found |= is_nonzero(values[n]);
    if (found) return true;
  }
  return false;
}

}  // namespace FPG_ISA
}  // namespace fpg
