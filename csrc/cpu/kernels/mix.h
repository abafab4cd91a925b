// mix: one chunk of columns of J <- C J, in place.
//
// A block of all rows is read, its new rows are computed into scratch, then it is written back while still cached.
// Blocks are small and go upwards, as those of combine.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fpg {
namespace FPG_ISA {

constexpr int64_t kMixBlockBytes = 1 << 12;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMixVectors = 4;  // 4 x 4 sums, 4 operands and a coefficient of 32 registers
#else
constexpr int kMixVectors = 2;  // 4 x 2 sums, 2 operands and a coefficient of 16 registers
#endif

template <class Acc>
inline int64_t mix_block(int64_t tasks) {
  const int64_t columns = kMixBlockBytes / (tasks * static_cast<int64_t>(sizeof(Acc))) / 64 * 64;
  return columns < 64 ? 64 : columns;
}

// Scratch: where padded rows begin, the coefficients, the new rows of a block, and the padded rows: one vector of each,
// for the columns that fill none.
template <class Acc>
inline int64_t mix_scratch_of(int64_t tasks) {
  return (tasks * tasks + tasks * mix_block<Acc>(tasks)) * static_cast<int64_t>(sizeof(Acc)) +
         tasks * (kVectorBytes + static_cast<int64_t>(sizeof(void*)));
}
inline int64_t mix_scratch(int64_t tasks) {
  const int64_t narrow = mix_scratch_of<float>(tasks), wide = mix_scratch_of<double>(tasks);
  return narrow > wide ? narrow : wide;
}

// R new rows over V vectors of columns from `first`, in registers.
template <class Acc, int R, int V, class Row>
inline void mix_tile(const void* const* rows, int64_t tasks, int64_t first, const Acc* coefficients, Acc* mixed,
                     int64_t mixed_stride) {
  Vector<Acc> sums[R][V] = {};
  for (int64_t t = 0; t < tasks; ++t) {
    const Row* row = static_cast<const Row*>(rows[t]) + first;
    Vector<Acc> values[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) values[v] = load(row + v * kLanes<Acc>, Acc());
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] += coefficients[r * tasks + t] * values[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store_unaligned(mixed + r * mixed_stride + v * kLanes<Acc>, sums[r][v]);
  }
}

// R new rows over `columns` from `first`, a multiple of the lanes.
template <class Acc, int R, class Row>
inline void mix_rows(const void* const* rows, int64_t tasks, int64_t first, int64_t columns, const Acc* coefficients,
                     Acc* mixed) {
  constexpr int64_t kStep = kMixVectors * kLanes<Acc>;
  int64_t n = 0;
  for (; n + kStep <= columns; n += kStep) {
    mix_tile<Acc, R, kMixVectors, Row>(rows, tasks, first + n, coefficients, mixed + n, columns);
  }
  for (; n < columns; n += kLanes<Acc>) {
    mix_tile<Acc, R, 1, Row>(rows, tasks, first + n, coefficients, mixed + n, columns);
  }
}

template <class Acc, class Row>
inline void mix_columns(const void* const* rows, int64_t tasks, int64_t first, int64_t columns, const Acc* coefficients,
                        Acc* mixed) {
  for (int64_t i = 0; i < tasks; i += 4) {
    const Acc* c = coefficients + i * tasks;
    Acc* to = mixed + i * columns;
    switch (tasks - i) {
      case 1: mix_rows<Acc, 1, Row>(rows, tasks, first, columns, c, to); break;
      case 2: mix_rows<Acc, 2, Row>(rows, tasks, first, columns, c, to); break;
      case 3: mix_rows<Acc, 3, Row>(rows, tasks, first, columns, c, to); break;
      default: mix_rows<Acc, 4, Row>(rows, tasks, first, columns, c, to);
    }
  }
}

template <class Row, class Acc>
void mix(void* const* rows, int64_t tasks, Chunk chunk, const double* coefficients, void* scratch) {
  const int64_t block = mix_block<Acc>(tasks);
  const void** padded_rows = static_cast<const void**>(scratch);
  Acc* c = reinterpret_cast<Acc*>(padded_rows + tasks);
  for (int64_t k = 0; k < tasks * tasks; ++k) c[k] = static_cast<Acc>(coefficients[k]);
  Acc* mixed = c + tasks * tasks;
  const int64_t whole = chunk.first + (chunk.last - chunk.first) / kLanes<Acc> * kLanes<Acc>;

  for (int64_t first = chunk.first; first < whole; first += block) {
    const int64_t length = whole - first < block ? whole - first : block;
    mix_columns<Acc, Row>(rows, tasks, first, length, c, mixed);
    for (int64_t t = 0; t < tasks; ++t) {
      Row* row = static_cast<Row*>(rows[t]) + first;
      for (int64_t n = 0; n < length; n += kLanes<Acc>) {
        store<Row, Acc>(row + n, load_unaligned<Vector<Acc>>(mixed + t * length + n));
      }
    }
  }
  if (const int64_t rest = chunk.last - whole) {
    Row* padded = reinterpret_cast<Row*>(mixed + tasks * block);
    __builtin_memset(padded, 0, tasks * kLanes<Acc> * sizeof(Row));
    for (int64_t t = 0; t < tasks; ++t) {
      padded_rows[t] = padded + t * kLanes<Acc>;
      __builtin_memcpy(padded + t * kLanes<Acc>, static_cast<const Row*>(rows[t]) + whole, rest * sizeof(Row));
    }
    mix_columns<Acc, Row>(padded_rows, tasks, 0, kLanes<Acc>, c, mixed);
    for (int64_t t = 0; t < tasks; ++t) {
      for (int64_t n = 0; n < rest; ++n) round_to(static_cast<Row*>(rows[t]) + whole + n, mixed[t * kLanes<Acc> + n]);
    }
  }
}

}  // namespace FPG_ISA
}  // namespace fpg
