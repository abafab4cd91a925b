// trimmed_mean: in one chunk of columns, the mean of the entries but for the largest and the smallest ones.
//
// A few vectors of columns of all rows lie in the first-level cache, where a sorting network exchanges whole rows of
// them. An entry that is not finite would be sorted away: it makes its column NaN by a sum of its own.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fpg {
namespace FPG_ISA {

constexpr int kTrimVectors = 4;
template <class Acc>
constexpr int64_t kTrimColumns = kTrimVectors * kLanes<Acc>;

inline int64_t trimmed_mean_scratch(int64_t tasks) { return tasks * kTrimVectors * kVectorBytes; }

template <class Acc>
inline void exchange(Acc* low, Acc* high) {
#pragma GCC unroll 8
  for (int v = 0; v < kTrimVectors; ++v) {
    const Vector<Acc> a = load_unaligned<Vector<Acc>>(low + v * kLanes<Acc>);
    const Vector<Acc> b = load_unaligned<Vector<Acc>>(high + v * kLanes<Acc>);
    store_unaligned(low + v * kLanes<Acc>, smaller(a, b));
    store_unaligned(high + v * kLanes<Acc>, larger(a, b));
  }
}

// `out` may be one of the rows: columns are read before they are written.
template <class Row, class Acc>
void trimmed_mean(const void* const* rows, int64_t count, int64_t tasks, Chunk chunk, SortingNetwork network,
                  int64_t trim, void* out, void* scratch) {
  constexpr int64_t kColumns = kTrimColumns<Acc>;
  Acc* entries = static_cast<Acc*>(scratch);  // [tasks, kColumns]
  for (int64_t first = chunk.first; first < chunk.last; first += kColumns) {
    const int64_t columns = chunk.last - first < kColumns ? chunk.last - first : kColumns;
    Vector<Acc> broken[kTrimVectors] = {};  // zero, or NaN where an entry is not finite
    for (int64_t t = 0; t < count; ++t) {
      const Row* row = static_cast<const Row*>(rows[t]) + first;
      Row padded[kColumns];
      if (columns < kColumns) {
        __builtin_memset(padded, 0, sizeof(padded));
        __builtin_memcpy(padded, row, columns * sizeof(Row));
        row = padded;
      }
#pragma GCC unroll 8
      for (int v = 0; v < kTrimVectors; ++v) {
        const Vector<Acc> found = load(row + v * kLanes<Acc>, Acc());
        broken[v] += found * Acc(0);
        store_unaligned(entries + t * kColumns + v * kLanes<Acc>, found);
      }
    }
    __builtin_memset(entries + count * kColumns, 0, (tasks - count) * kColumns * sizeof(Acc));
    for (int64_t k = 0; k < network.size; ++k) {
      exchange(entries + network.low[k] * kColumns, entries + network.high[k] * kColumns);
    }

    Row merged[kColumns];
#pragma GCC unroll 8
    for (int v = 0; v < kTrimVectors; ++v) {
      Vector<Acc> sum = {};
      for (int64_t t = trim; t < tasks - trim; ++t) {
        sum += load_unaligned<Vector<Acc>>(entries + t * kColumns + v * kLanes<Acc>);
      }
      store<Row, Acc>(merged + v * kLanes<Acc>, sum / static_cast<Acc>(tasks - 2 * trim) + broken[v]);
    }
    __builtin_memcpy(static_cast<Row*>(out) + first, merged, columns * sizeof(Row));
  }
}

}  // namespace FPG_ISA
}  // namespace fpg
