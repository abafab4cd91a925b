// Which columns are whose: index maths that the host, the kernels and the tests share.
//
// Columns lie on one grid of steps from column 0, whatever the segments. A slot is a range of whole steps; where a
// segment meets a slot there is an item, with a partial Gram matrix of its own. Going through the columns, each new
// pair raises the slot or the segment by one, so slot + segment numbers the items without gaps worth a table, and a
// binary search in the offsets finds the pair again.
//
// Everything follows from T, N, the row type and the segments alone, never from the GPU: so do the bits of every sum.
#pragma once

#include <cstdint>

#include "../host_device.h"
#include "tuned.h"

namespace fpg {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Rows that one thread holds of its columns: the class of T. Above, tiles of rows.
constexpr int kMostRowsHeld = 8;
constexpr int kLargestTasks = 256;

FPG_HOST_DEVICE constexpr int vectors_of(int rows_held) {
  return rows_held == 2 ? FPG_VECTORS_OF_2 : rows_held == 4 ? FPG_VECTORS_OF_4 : FPG_VECTORS_OF_8;
}
FPG_HOST_DEVICE constexpr int rows_held_for(int64_t tasks) { return tasks <= 2 ? 2 : tasks <= 4 ? 4 : kMostRowsHeld; }

// Rows of the largest tile, and addresses of a block's rows in shared memory: tiles may ask for rows from T on.
constexpr int kRowsOfTile = 64;
FPG_HOST_DEVICE constexpr int addresses_of_block(int tasks) {
  return (tasks + kRowsOfTile - 1) / kRowsOfTile * kRowsOfTile;
}

// Elements of 16 bytes.
FPG_HOST_DEVICE constexpr int elements_of_vector(int64_t itemsize) { return static_cast<int>(16 / itemsize); }

// A lane of fp32 takes this many products before they go to float64: a lane that holds one large product loses up to
// half of its last place with each further one, and 32 stay within 1e-6 of the sum of the squares.
constexpr int kProductsOfLane = 32;

// Vectors of a row that the tensor cores take in a step, a line of the cache; four are a slab. Each block of 16 rows
// has a warp of its own.
constexpr int kLine = 8;
constexpr int kSlabs = kLine / 4;
FPG_HOST_DEVICE constexpr int warps_of_strip(int64_t tasks) { return tasks <= 16 ? 1 : tasks <= 32 ? 2 : 4; }

// The lower triangle, row by row.
FPG_HOST_DEVICE constexpr int64_t pair_index(int64_t i, int64_t j) { return i * (i + 1) / 2 + j; }

struct Pair {
  int64_t i;
  int64_t j;
};
// Of numbers below pair_index(2 kLargestTasks, 0).
FPG_HOST_DEVICE Pair pair_of(int64_t index) {
  const int number = static_cast<int>(index);
  int i = 0;
  for (int step = kLargestTasks; step > 0; step /= 2) {
    if ((i + step) * (i + step + 1) / 2 <= number) i += step;
  }
  return {i, number - i * (i + 1) / 2};
}

struct Plan {
  int64_t step;  // columns that a block takes at a time
  int64_t span;  // columns of a slot: whole steps
  int64_t slots;
  int64_t items;  // slots + segments - 1
};

FPG_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Plan make_plan(int64_t width, int64_t segments, int64_t step, int64_t most_slots) {
  const int64_t steps = divide_up(width, step);
  int64_t slots = steps / 8;
  if (slots < FPG_FEW_SLOTS) slots = steps < FPG_FEW_SLOTS ? steps : FPG_FEW_SLOTS;
  if (slots > most_slots) slots = most_slots;
  if (slots < 1) slots = 1;
  const int64_t span = divide_up(steps < 1 ? 1 : steps, slots) * step;
  slots = divide_up(width, span);
  if (slots < 1) slots = 1;
  return {step, span, slots, slots + segments - 1};
}

// Of the passes in which a thread owns columns: gram up to 8 rows or of float64, combine, mix.
inline int64_t columns_step(int64_t tasks, int64_t itemsize) {
  const int64_t vectors = tasks <= kMostRowsHeld ? vectors_of(rows_held_for(tasks)) : 1;
  return kThreads * vectors * elements_of_vector(itemsize);
}
inline Plan columns_plan(int64_t tasks, int64_t width, int64_t segments, int64_t itemsize) {
  return make_plan(width, segments, columns_step(tasks, itemsize), FPG_MANY_SLOTS);
}

// Of gram above 8 rows, whose step is a part of that of columns_plan. The partial Gram matrices stay below 2^21
// numbers, but for very many segments.
inline int64_t most_gram_slots(int64_t tasks) {
  if (tasks <= kMostRowsHeld) return FPG_MANY_SLOTS;
  const int64_t numbers = (int64_t{1} << 21) / pair_index(tasks, 0);
  return numbers < 64 ? 64 : numbers > FPG_MANY_SLOTS / 2 ? FPG_MANY_SLOTS / 2 : numbers;
}
inline Plan gram_plan(int64_t tasks, int64_t width, int64_t segments, int64_t itemsize) {
  if (tasks <= kMostRowsHeld) return columns_plan(tasks, width, segments, itemsize);
  const int64_t vector = elements_of_vector(itemsize);
  const int64_t step = itemsize == 8 ? kThreads * vector : kWarps / warps_of_strip(tasks) * kLine * vector;
  return make_plan(width, segments, step, most_gram_slots(tasks));
}

// Above 8 rows the Gram matrix is made by tiles: of float64 rows, pairs of 8 rows. Of others, first all rows up to 64,
// or each 64 rows with themselves; then each 32 rows with 32 of other ones.
FPG_HOST_DEVICE constexpr int64_t tiles_of_gram(int64_t tasks, int64_t itemsize) {
  if (tasks <= kMostRowsHeld) return 1;
  if (itemsize == 8) return pair_index(divide_up(tasks, 8), 0);
  const int64_t tiles = divide_up(tasks, kRowsOfTile);
  return tiles + 4 * pair_index(tiles - 1, 0);
}
// The first rows of a tile's two parts of 32 rows; the others follow them.
FPG_HOST_DEVICE Pair rows_of_tile(int64_t tasks, int64_t tile) {
  constexpr int kPart = kRowsOfTile / 2;
  const int64_t tiles = divide_up(tasks, kRowsOfTile), other = tile - tiles;
  if (other < 0) return {tile * kRowsOfTile, tile * kRowsOfTile + kPart};
  const Pair pair = pair_of(other / 4);
  return {(pair.i + 1) * kRowsOfTile + other / 2 % 2 * kPart, pair.j * kRowsOfTile + other % 2 * kPart};
}

// The columns [first, last) of a segment; clamped, since offsets on the device cannot be validated without a sync.
struct Range {
  int64_t first;
  int64_t last;
};
FPG_HOST_DEVICE Range segment_range(const int64_t* offsets, int64_t s, int64_t width) {
  if (offsets == nullptr) return {0, width};
  int64_t first = offsets[s], last = offsets[s + 1];
  first = first < 0 ? 0 : first > width ? width : first;
  last = last < first ? first : last > width ? width : last;
  return {first, last};
}

struct Item {
  int64_t segment;
  int64_t slot;
  Range columns;  // where the segment meets the slot; may be empty
};
FPG_HOST_DEVICE Item item_at(const Plan& plan, const int64_t* offsets, int64_t segments, int64_t width, int64_t item) {
  int64_t s = 0, end = segments;
  while (end - s > 1) {
    const int64_t middle = (s + end) / 2;
    // offsets[middle] / span + middle <= item, without a division
    (offsets[middle] < (item - middle + 1) * plan.span ? s : end) = middle;
  }
  Range range = segment_range(offsets, s, width);
  const int64_t slot = item - s;
  if (range.first < slot * plan.span) range.first = slot * plan.span;
  if (range.last > (slot + 1) * plan.span) range.last = (slot + 1) * plan.span;
  if (range.last < range.first) range.last = range.first;
  return {s, slot, range};
}

// The items [first, last) of a segment.
FPG_HOST_DEVICE Range items_of(const Plan& plan, const int64_t* offsets, int64_t s, int64_t width) {
  const Range range = segment_range(offsets, s, width);
  const int64_t first = range.first / plan.span + s;
  return {first, range.last > range.first ? (range.last - 1) / plan.span + s + 1 : first};
}

// Steps [first, last) of an item, as numbers on the grid.
FPG_HOST_DEVICE Range steps_of(const Plan& plan, Range columns) {
  return {columns.first / plan.step, divide_up(columns.last, plan.step)};
}

}  // namespace fpg
