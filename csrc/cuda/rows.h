// J: where its rows lie, packed or in blocks, and their elements in vectors of 16 bytes.
#pragma once

#include "plan.h"
#include "platform.h"

namespace fpg {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// The two forms of J, which the kernels take as their parameter J. Either says which columns an item has, to which
// problem they belong, and what rows they have: `of` an item gives rows with
//   tasks, aligned (whether all begin at a multiple of 16 bytes, with out), out, has(t), row<Row>(t), and
//   below(row, t, more): row t + more, from row t where that is quicker.
// A row that is not there is all zeros; so are the rows from T on.

// Packed: row t begins at data + t * stride elements, and a segment is a problem.
struct Rows {
  void* data;
  int tasks;
  int64_t width;
  int64_t stride;
  const int64_t* offsets;
  int64_t problems;
  bool aligned;
  void* out;

  __device__ Item item(const Plan& plan, int64_t number) const {
    return item_at(plan, offsets, problems, width, number);
  }
  __device__ Range items(const Plan& plan, int64_t problem) const {
    if (offsets == nullptr) return {0, plan.items};
    return items_of(plan, offsets, problem, width);
  }
  __device__ int64_t problem_of(const Item& item) const { return item.segment; }
  __device__ const Rows& of(const Item&) const { return *this; }

  __device__ bool has(int64_t t) const { return t < tasks; }
  template <class Row>
  __device__ Row* row(int64_t t) const {
    return static_cast<Row*>(data) + t * stride;
  }
  template <class Row>
  __device__ Row* below(Row* row, int64_t, int more) const {
    return row + more * stride;
  }
};

// The rows of one block, whose addresses lie in shared memory: each row's, moved back by the block's first column, so
// that it is indexed with columns of J. No row lies so low in memory that this could give a null.
struct RowsOfBlock {
  const uint64_t* addresses;  // a multiple of kRowsOfTile
  int tasks;
  bool aligned;
  void* out;

  __device__ bool has(int64_t t) const { return addresses[t] != 0; }
  template <class Row>
  __device__ Row* row(int64_t t) const {
    return static_cast<Row*>(global_memory(addresses[t]));
  }
  template <class Row>
  __device__ Row* below(Row*, int64_t t, int more) const {
    return row<Row>(t + more);
  }
};

// In blocks: on the grid of steps the blocks follow each other, each from a step of its own on, and the columns between
// a block's last and the next one's first do not exist. An item belongs to one block, as to one segment of packed rows.
// The blocks of a problem are neighbours.
struct BlockRows {
  int tasks;
  int64_t blocks;
  int64_t width;  // of the grid
  int64_t problems;
  const int64_t* firsts;       // [blocks + 1]: the first column of each
  const int64_t* lasts;        // [blocks]: behind the last one
  const int64_t* problem;      // [blocks]
  const int64_t* first_block;  // [problems + 1]
  const uint64_t* out;         // [blocks]: addresses, as in RowsOfBlock
  const uint64_t* addresses;   // [blocks, T]
  int64_t shared_at;           // where in a block's shared memory RowsOfBlock::addresses go

  __device__ Item item(const Plan& plan, int64_t number) const {
    Item found = item_at(plan, firsts, blocks, width, number);
    const int64_t last = lasts[found.segment];
    if (found.columns.last > last) found.columns.last = last;
    if (found.columns.last < found.columns.first) found.columns.last = found.columns.first;
    return found;
  }
  __device__ Range items(const Plan& plan, int64_t problem_number) const {
    const int64_t b = first_block[problem_number], end = first_block[problem_number + 1];
    if (b == end) return {0, 0};
    return {firsts[b] / plan.span + b, end < blocks ? firsts[end] / plan.span + end : plan.items};
  }
  __device__ int64_t problem_of(const Item& item) const { return problem[item.segment]; }

  // For all threads of a block.
  __device__ RowsOfBlock of(const Item& item) const {
    uint64_t* here = reinterpret_cast<uint64_t*>(shared_memory() + shared_at);
    const uint64_t to = out[item.segment];
    bool unaligned = to % 16 != 0;
    sync_block();  // the addresses before are done with
    for (int t = thread_index(); t < addresses_of_block(tasks); t += kThreads) {
      const uint64_t address = t < tasks ? addresses[item.segment * tasks + t] : 0;
      here[t] = address;
      unaligned = unaligned || address % 16 != 0;
    }
    return {here, tasks, !any_in_block(unaligned), global_memory(to)};
  }
};

template <class Row>
struct RowType {
  using Acc = float;
};
template <>
struct RowType<double> {
  using Acc = double;
};
template <class Row>
using Accumulator = typename RowType<Row>::Acc;

template <class Row>
constexpr int kVector = 16 / static_cast<int>(sizeof(Row));

template <class Row>
constexpr bool kIsDouble = sizeof(Row) == 8;

__device__ inline float widened(float value) { return value; }
__device__ inline double widened(double value) { return value; }
__device__ inline float widened(Half value) { return half_to_float(value.bits); }
__device__ inline float widened(BFloat value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

__device__ inline void round_to(float* to, float value) { *to = value; }
__device__ inline void round_to(float* to, double value) { *to = static_cast<float>(value); }
__device__ inline void round_to(double* to, double value) { *to = value; }
template <class Acc>
__device__ inline void round_to(Half* to, Acc value) {
  to->bits = float_to_half(static_cast<float>(value));
}
template <class Acc>
__device__ inline void round_to(BFloat* to, Acc value) {
  to->bits = float_to_bfloat(static_cast<float>(value));
}

// Element v of a vector, as it is stored and widened. v is a constant wherever this is called: the words stay in
// registers.
template <class Row>
__device__ inline Row element_of(const Packed& packed, int v) {
  if constexpr (sizeof(Row) == 8) {
    return bits_to_double(static_cast<uint64_t>(packed.word[2 * v + 1]) << 32 | packed.word[2 * v]);
  } else if constexpr (sizeof(Row) == 4) {
    return bits_to_float(packed.word[v]);
  } else {
    return {static_cast<uint16_t>(packed.word[v / 2] >> (v % 2 * 16))};
  }
}
template <class Row>
__device__ inline Accumulator<Row> element(const Packed& packed, int v) {
  return widened(element_of<Row>(packed, v));
}

template <class Row>
__device__ inline void set_element(Packed& packed, int v, Row value) {
  if constexpr (sizeof(Row) == 8) {
    packed.word[2 * v] = static_cast<uint32_t>(double_to_bits(value));
    packed.word[2 * v + 1] = static_cast<uint32_t>(double_to_bits(value) >> 32);
  } else if constexpr (sizeof(Row) == 4) {
    packed.word[v] = float_to_bits(value);
  } else {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << (v % 2 * 16);
    packed.word[v / 2] = v % 2 == 0 ? bits : packed.word[v / 2] | bits;
  }
}

__device__ inline Packed zeros() { return {{0, 0, 0, 0}}; }

// Which elements of the vector that begins at column `first` lie in `columns`: [first, last).
struct Part {
  int first;
  int last;

  __device__ bool has(int v) const { return v >= first && v < last; }
};
template <class Row>
__device__ inline Part part_of_vector(int64_t first, Range columns) {
  const auto clamped = [](int64_t n) { return static_cast<int>(n < 0 ? 0 : n > kVector<Row> ? kVector<Row> : n); };
  return {clamped(columns.first - first), clamped(columns.last - first)};
}

// The elements of row[first .. first + V) that lie in `columns`, the others zero; element by element.
template <class Row>
__device__ inline Packed load_some(const Row* row, int64_t first, Range columns) {
  const Part part = part_of_vector<Row>(first, columns);
  Packed packed = zeros();
#pragma unroll
  for (int v = 0; v < kVector<Row>; ++v) set_element(packed, v, part.has(v) ? row[first + v] : Row{});
  return packed;
}

template <class Row, class Acc>
__device__ inline void store_rounded(Row* to, const Acc (&values)[kVector<Row>]) {
  Packed packed = zeros();
#pragma unroll
  for (int v = 0; v < kVector<Row>; ++v) {
    Row rounded;
    round_to(&rounded, values[v]);
    set_element(packed, v, rounded);
  }
  store_packed(to, packed);
}

__device__ inline bool contains(Range columns, int64_t first, int64_t count) {
  return first >= columns.first && first + count <= columns.last;
}

// The vectors of U x R rows that a thread owns in a step. `whole`: the step's columns all belong to the item, and the
// rows are aligned.
template <class Row, int U, int R, class J>
__device__ inline void load_owned(const J& rows, int64_t first_row, int64_t step_column, Packed (&x)[U][R]) {
  const int64_t own = step_column + thread_index() * kVector<Row>;
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t t = first_row + r;
      x[u][r] = rows.has(t) ? load_packed(rows.template row<Row>(t) + own + u * (kThreads * kVector<Row>)) : zeros();
    }
  }
}
template <class Row, int U, int R, class J>
__device__ inline void load_owned(const J& rows, int64_t first_row, int64_t step_column, Range columns, bool whole,
                                  Packed (&x)[U][R]) {
  if (whole) return load_owned<Row>(rows, first_row, step_column, x);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int64_t own = step_column + (u * kThreads + thread_index()) * kVector<Row>;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t t = first_row + r;
      x[u][r] = rows.has(t) ? load_some(rows.template row<Row>(t), own, columns) : zeros();
    }
  }
}

}  // namespace fpg
