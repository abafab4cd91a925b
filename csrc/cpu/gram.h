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

// Where the next block of rows lies in memory. The first tile of each row of tiles asks for its rows of it, so that the
// memory works while the core multiplies.
struct Ahead {
  const char* rows;
  int64_t stride;          // bytes
  int64_t bytes_per_step;  // that a tile's step over one vector of the current block stands for
};

// sums[r][c] += lanes of a_r * b_c over `columns`, a multiple of the lanes; for a diagonal tile a = b and c <= r.
template <class Acc, int R, int C, bool kDiagonal>
inline void gram_tile(const Acc* a, const Acc* b, int64_t row_stride, int64_t columns, const Ahead* ahead,
                      Vector<double>* const* sums) {
  Vector<Acc> lanes[R][C] = {};
  const char* next = ahead ? ahead->rows : nullptr;
  const int64_t next_stride = ahead ? ahead->stride : 0, next_step = ahead ? ahead->bytes_per_step : 0;
  for (int64_t n = 0; n < columns; n += kLanes<Acc>) {
    if (next) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) __builtin_prefetch(next + r * next_stride, 0, 2);
      next += next_step;
    }
    Vector<Acc> x[R], y[C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = load(a + r * row_stride + n, Acc());
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) y[c] = kDiagonal ? x[c] : load(b + c * row_stride + n, Acc());
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

// A tile of R rows; below the diagonal it is kTile wide, since only the last tile of rows can be narrower.
template <class Acc, int R>
inline void gram_tile_of(bool diagonal, const Acc* a, const Acc* b, int64_t row_stride, int64_t columns,
                         const Ahead* ahead, Vector<double>* const* sums) {
  if (diagonal) {
    gram_tile<Acc, R, R, true>(a, a, row_stride, columns, ahead, sums);
  } else {
    gram_tile<Acc, R, kTile, false>(a, b, row_stride, columns, ahead, sums);
  }
}

template <class Acc>
inline void gram_block(const Acc* rows, int64_t tasks, int64_t row_stride, int64_t columns, Ahead ahead,
                       Vector<double>* sums) {
  for (int64_t i = 0; i < tasks; i += kTile) {
    const int64_t height = tasks - i < kTile ? tasks - i : kTile;
    for (int64_t j = 0; j <= i; j += kTile) {
      Vector<double>* tile[kTile];
      for (int64_t r = 0; r < height; ++r) tile[r] = sums + (i + r) * (i + r + 1) / 2 + j;
      const Acc* a = rows + i * row_stride;
      const Acc* b = rows + j * row_stride;
      const Ahead own{ahead.rows + i * ahead.stride, ahead.stride, ahead.bytes_per_step};
      const Ahead* next = j == 0 && tasks > kTile ? &own : nullptr;  // a single tile streams well by itself
      switch (height) {
        case 1: gram_tile_of<Acc, 1>(i == j, a, b, row_stride, columns, next, tile); break;
        case 2: gram_tile_of<Acc, 2>(i == j, a, b, row_stride, columns, next, tile); break;
        case 3: gram_tile_of<Acc, 3>(i == j, a, b, row_stride, columns, next, tile); break;
        default: gram_tile_of<Acc, kTile>(i == j, a, b, row_stride, columns, next, tile);
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

// Rows of `columns` elements as accumulators, padded with zeros to whole vectors.
template <class Acc, class Row>
inline void pack(const Row* rows, int64_t tasks, int64_t row_stride, int64_t columns, Acc* packed,
                 int64_t packed_stride) {
  const int64_t whole = columns / kLanes<Acc> * kLanes<Acc>;
  for (int64_t t = 0; t < tasks; ++t) {
    const Row* from = rows + t * row_stride;
    Acc* to = packed + t * packed_stride;
    for (int64_t n = 0; n < whole; n += kLanes<Acc>) store_unaligned(to + n, load(from + n, Acc()));
    if (whole < columns) {
      Row padded[kLanes<Acc>] = {};
      __builtin_memcpy(padded, from + whole, (columns - whole) * sizeof(Row));
      store_unaligned(to + whole, load(padded, Acc()));
    }
  }
}

// Scratch: the float64 sums, then a packed block.
inline int64_t gram_scratch(int64_t tasks) {
  const int64_t narrow = gram_block_columns<float>(tasks) * static_cast<int64_t>(sizeof(float));
  const int64_t wide = gram_block_columns<double>(tasks) * static_cast<int64_t>(sizeof(double));
  return tasks * (tasks + 1) / 2 * kVectorBytes + tasks * (narrow > wide ? narrow : wide);
}

template <class Row, class Acc>
constexpr bool kSameType = false;
template <class Acc>
constexpr bool kSameType<Acc, Acc> = true;

// One block: where it lies if its type is the accumulator's and it fills vectors, else packed.
template <class Acc, class Row>
inline void gram_of(const Row* rows, int64_t tasks, int64_t row_stride, int64_t columns, Acc* packed,
                    Vector<double>* sums) {
  const int64_t size = sizeof(Row);
  const Ahead ahead{reinterpret_cast<const char*>(rows + columns), row_stride * size, kLanes<Acc> * size};
  if constexpr (kSameType<Row, Acc>) {
    if (columns % kLanes<Acc> == 0) return gram_block<Acc>(rows, tasks, row_stride, columns, ahead, sums);
  }
  const int64_t padded = (columns + kLanes<Acc> - 1) / kLanes<Acc> * kLanes<Acc>;
  pack<Acc>(rows, tasks, row_stride, columns, packed, padded);
  gram_block<Acc>(packed, tasks, padded, padded, ahead, sums);
}

template <class Row, class Acc>
void gram(const void* grads, int64_t tasks, int64_t row_stride, Chunk chunk, double* partial, void* scratch) {
  const Row* rows = static_cast<const Row*>(grads);
  const int64_t pairs = tasks * (tasks + 1) / 2;
  Vector<double>* sums = static_cast<Vector<double>*>(scratch);
  for (int64_t pair = 0; pair < pairs; ++pair) sums[pair] = Vector<double>{};

  Acc* packed = reinterpret_cast<Acc*>(sums + pairs);
  const int64_t block = gram_block_columns<Acc>(tasks);
  for (int64_t first = chunk.first; first < chunk.last; first += block) {
    const int64_t columns = chunk.last - first < block ? chunk.last - first : block;
    gram_of<Acc>(rows + first, tasks, row_stride, columns, packed, sums);
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
