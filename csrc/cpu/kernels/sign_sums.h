// sign_sums: in one chunk of columns, the weighted sums of the positive and of the negative entries.
//
// Row by row into a block of either sum that stays in the first-level cache. Not a number is not positive: it goes to
// the negative ones.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fpg {
namespace FPG_ISA {

constexpr int64_t kSignBlock = 128;

// Over `columns` entries of a row, a multiple of the lanes.
template <class Acc, class Row>
inline void add_signs(const Row* row, int64_t columns, Acc weight, Acc* positive, Acc* negative) {
  const Vector<Acc> zero = {};
  for (int64_t n = 0; n < columns; n += kLanes<Acc>) {
    const Vector<Acc> entries = load(row + n, Acc());
    const auto is_positive = entries > zero;
    const Vector<Acc> above = load_unaligned<Vector<Acc>>(positive + n);
    const Vector<Acc> below = load_unaligned<Vector<Acc>>(negative + n);
    store_unaligned(positive + n, above + weight * (is_positive ? entries : zero));
    store_unaligned(negative + n, below + weight * (is_positive ? zero : entries));
  }
}

template <class Row, class Acc>
void sign_sums(const void* const* rows, int64_t count, Chunk chunk, const double* weights, void* positive,
               void* negative) {
  for (int64_t first = chunk.first; first < chunk.last; first += kSignBlock) {
    const int64_t columns = chunk.last - first < kSignBlock ? chunk.last - first : kSignBlock;
    const int64_t whole = columns / kLanes<Acc> * kLanes<Acc>, rest = columns - whole;
    alignas(64) Acc above[kSignBlock] = {}, below[kSignBlock] = {};
    for (int64_t t = 0; t < count; ++t) {
      const Row* row = static_cast<const Row*>(rows[t]) + first;
      const Acc weight = static_cast<Acc>(weights[t]);
      add_signs(row, whole, weight, above, below);
      if (rest) {
        Row padded[kLanes<Acc>] = {};
        __builtin_memcpy(padded, row + whole, rest * sizeof(Row));
        add_signs(padded, kLanes<Acc>, weight, above + whole, below + whole);
      }
    }
    __builtin_memcpy(static_cast<Acc*>(positive) + first, above, columns * sizeof(Acc));
    __builtin_memcpy(static_cast<Acc*>(negative) + first, below, columns * sizeof(Acc));
  }
}

}  // namespace FPG_ISA
}  // namespace fpg
