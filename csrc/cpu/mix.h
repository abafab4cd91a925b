// mix: one chunk of columns of J <- C J, in place.
//
// A block of all rows is read, its new rows are computed into scratch, then it is written back while still cached.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fpg {
namespace FPG_ISA {

constexpr int64_t kMixBlockBytes = 1 << 15;
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

// Scratch: the coefficients, the new rows of a block, then one vector of each row for the columns that fill none.
template <class Acc>
inline int64_t mix_scratch_of(int64_t tasks) {
  return (tasks * tasks + tasks * mix_block<Acc>(tasks)) * static_cast<int64_t>(sizeof(Acc)) + tasks * kVectorBytes;
}
inline int64_t mix_scratch(int64_t tasks) {
  const int64_t narrow = mix_scratch_of<float>(tasks), wide = mix_scratch_of<double>(tasks);
  return narrow > wide ? narrow : wide;
}

// R new rows over V vectors of columns, in registers.
template <class Acc, int R, int V, class Row>
inline void mix_tile(const Row* rows, int64_t tasks, int64_t row_stride, const Acc* coefficients, Acc* mixed,
                     int64_t mixed_stride) {
  Vector<Acc> sums[R][V] = {};
  for (int64_t t = 0; t < tasks; ++t) {
    Vector<Acc> values[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) values[v] = load(rows + t * row_stride + v * kLanes<Acc>, Acc());
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

// R new rows over `columns`, a multiple of the lanes.
template <class Acc, int R, class Row>
inline void mix_rows(const Row* rows, int64_t tasks, int64_t row_stride, int64_t columns, const Acc* coefficients,
                     Acc* mixed, int64_t mixed_stride) {
  constexpr int64_t kStep = kMixVectors * kLanes<Acc>;
  int64_t n = 0;
  for (; n + kStep <= columns; n += kStep) {
    mix_tile<Acc, R, kMixVectors>(rows + n, tasks, row_stride, coefficients, mixed + n, mixed_stride);
  }
  for (; n < columns; n += kLanes<Acc>) {
    mix_tile<Acc, R, 1>(rows + n, tasks, row_stride, coefficients, mixed + n, mixed_stride);
  }
}

template <class Acc, class Row>
inline void mix_columns(const Row* rows, int64_t tasks, int64_t row_stride, int64_t columns, const Acc* coefficients,
                        Acc* mixed) {
  for (int64_t i = 0; i < tasks; i += 4) {
    const Acc* c = coefficients + i * tasks;
    Acc* to = mixed + i * columns;
    switch (tasks - i) {
      case 1: mix_rows<Acc, 1>(rows, tasks, row_stride, columns, c, to, columns); break;
      case 2: mix_rows<Acc, 2>(rows, tasks, row_stride, columns, c, to, columns); break;
      case 3: mix_rows<Acc, 3>(rows, tasks, row_stride, columns, c, to, columns); break;
      default: mix_rows<Acc, 4>(rows, tasks, row_stride, columns, c, to, columns);
    }
  }
}

// Backwards, as combine.
template <class Row, class Acc>
void mix(void* grads, int64_t tasks, int64_t row_stride, Chunk chunk, const double* coefficients, void* scratch) {
  Row* rows = static_cast<Row*>(grads) + chunk.first;
  const int64_t columns = chunk.last - chunk.first;
  const int64_t block = mix_block<Acc>(tasks);
  Acc* c = static_cast<Acc*>(scratch);
  for (int64_t k = 0; k < tasks * tasks; ++k) c[k] = static_cast<Acc>(coefficients[k]);
  Acc* mixed = c + tasks * tasks;
  int64_t left = columns / kLanes<Acc> * kLanes<Acc>;

  if (const int64_t rest = columns - left) {
    Row* padded = reinterpret_cast<Row*>(mixed + tasks * block);
    __builtin_memset(padded, 0, tasks * kLanes<Acc> * sizeof(Row));
    for (int64_t t = 0; t < tasks; ++t) {
      __builtin_memcpy(padded + t * kLanes<Acc>, rows + t * row_stride + left, rest * sizeof(Row));
    }
    mix_columns<Acc>(padded, tasks, kLanes<Acc>, kLanes<Acc>, c, mixed);
    for (int64_t t = 0; t < tasks; ++t) {
      for (int64_t n = 0; n < rest; ++n) round_to(rows + t * row_stride + left + n, mixed[t * kLanes<Acc> + n]);
    }
  }
  while (left > 0) {
    const int64_t length = (left - 1) % block + 1;
    left -= length;
    mix_columns<Acc>(rows + left, tasks, row_stride, length, c, mixed);
    for (int64_t t = 0; t < tasks; ++t) {
      for (int64_t n = 0; n < length; n += kLanes<Acc>) {
        store<Row, Acc>(rows + t * row_stride + left + n, load_unaligned<Vector<Acc>>(mixed + t * length + n));
      }
    }
  }
}

}  // namespace FPG_ISA
}  // namespace fpg
