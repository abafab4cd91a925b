// combine: one chunk of columns of w J.
//
// Up to kGroup rows are summed in registers. More rows go group by group through a block of the result that stays in
// the first-level cache: a core follows only so many streams. Blocks are short and go upwards, so that the rows are
// streams that the hardware reads ahead by itself; with blocks of some kilobytes a row, with prefetches of the
// program's own, or downwards it takes a fifth more time.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fpg {
namespace FPG_ISA {

constexpr int kGroup = 8;
constexpr int64_t kCombineBlock = 128;

// block (+)= weighted rows over `columns` from `first`, a multiple of the lanes.
template <class Acc, int kRows, bool kFirst, class Row>
inline void combine_group(const void* const* rows, int64_t first, int64_t columns, const double* weights, Acc* block) {
  const Row* row[kRows];
  Acc w[kRows];
  for (int r = 0; r < kRows; ++r) {
    row[r] = static_cast<const Row*>(rows[r]) + first;
    w[r] = static_cast<Acc>(weights[r]);
  }
  for (int64_t n = 0; n < columns; n += kLanes<Acc>) {
    Vector<Acc> sum = kFirst ? Vector<Acc>{} : load_unaligned<Vector<Acc>>(block + n);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum += w[r] * load(row[r] + n, Acc());
    store_unaligned(block + n, sum);
  }
}

template <class Acc, bool kFirst, class Row>
inline void combine_group_of(int64_t count, const void* const* rows, int64_t first, int64_t columns,
                             const double* weights, Acc* block) {
  switch (count) {
    case 1: return combine_group<Acc, 1, kFirst, Row>(rows, first, columns, weights, block);
    case 2: return combine_group<Acc, 2, kFirst, Row>(rows, first, columns, weights, block);
    case 3: return combine_group<Acc, 3, kFirst, Row>(rows, first, columns, weights, block);
    case 4: return combine_group<Acc, 4, kFirst, Row>(rows, first, columns, weights, block);
    case 5: return combine_group<Acc, 5, kFirst, Row>(rows, first, columns, weights, block);
    case 6: return combine_group<Acc, 6, kFirst, Row>(rows, first, columns, weights, block);
    case 7: return combine_group<Acc, 7, kFirst, Row>(rows, first, columns, weights, block);
    default: return combine_group<Acc, kGroup, kFirst, Row>(rows, first, columns, weights, block);
  }
}

template <class Acc, class Row>
inline void combine_rows(const void* const* rows, int64_t tasks, int64_t first, int64_t columns, const double* weights,
                         Acc* block) {
  combine_group_of<Acc, true, Row>(tasks, rows, first, columns, weights, block);
  for (int64_t t = kGroup; t < tasks; t += kGroup) {
    combine_group_of<Acc, false, Row>(tasks - t, rows + t, first, columns, weights + t, block);
  }
}

template <class Row, class Acc>
inline void write_block(Row* out, const Acc* block, int64_t columns, bool) {
  for (int64_t n = 0; n < columns; n += kLanes<Acc>) store<Row, Acc>(out + n, load_unaligned<Vector<Acc>>(block + n));
}
inline void write_block(float* out, const float* block, int64_t columns, bool past_caches) {
  if (past_caches && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0) {
    for (int64_t n = 0; n < columns; n += kFloats) stream(out + n, load_unaligned<Vector<float>>(block + n));
  } else {
    __builtin_memcpy(out, block, columns * sizeof(float));
  }
}

// Columns that do not fill a vector, row by row through a padded copy.
template <class Acc, class Row>
inline void combine_rest(const void* const* rows, int64_t tasks, int64_t first, int64_t columns, const double* weights,
                         Row* out) {
  alignas(64) Acc block[kLanes<Acc>] = {};
  for (int64_t t = 0; t < tasks; ++t) {
    Row padded[kLanes<Acc>] = {};
    const void* const row = padded;
    __builtin_memcpy(padded, static_cast<const Row*>(rows[t]) + first, columns * sizeof(Row));
    if (t == 0) {
      combine_group<Acc, 1, true, Row>(&row, 0, kLanes<Acc>, weights, block);
    } else {
      combine_group<Acc, 1, false, Row>(&row, 0, kLanes<Acc>, weights + t, block);
    }
  }
  for (int64_t n = 0; n < columns; ++n) round_to(out + n, block[n]);
}

// `out` may be one of the rows: a block is read whole before it is written.
template <class Row, class Acc>
void combine(const void* const* rows, int64_t tasks, Chunk chunk, const double* weights, void* out, bool past_caches) {
  Row* result = static_cast<Row*>(out);
  const int64_t whole = chunk.first + (chunk.last - chunk.first) / kLanes<Acc> * kLanes<Acc>;
  alignas(64) Acc block[kCombineBlock];
  for (int64_t first = chunk.first; first < whole; first += kCombineBlock) {
    const int64_t length = whole - first < kCombineBlock ? whole - first : kCombineBlock;
    combine_rows<Acc, Row>(rows, tasks, first, length, weights, block);
    write_block(result + first, block, length, past_caches);
  }
  if (whole < chunk.last) combine_rest<Acc>(rows, tasks, whole, chunk.last - whole, weights, result + whole);
}

}  // namespace FPG_ISA
}  // namespace fpg
