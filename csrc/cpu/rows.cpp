// Where the blocks of J lie, and which pieces they are cut into.
#include "rows.h"

namespace fpg {

Rows Rows::packed(const void* data, int64_t tasks, int64_t width, int64_t row_stride, int dtype, const int64_t* offsets,
                  int64_t segments, void* out) {
  Rows rows(tasks, dtype, segments);
  if (!rows.valid() || width < 0) return rows;
  rows.reserve(segments);
  const int64_t size = kRowBytes[dtype];
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t first = offsets ? offsets[s] : 0, last = offsets ? offsets[s + 1] : width;
    for (int64_t t = 0; t < tasks; ++t) {
      rows.add_row(t, static_cast<const char*>(data) + (t * row_stride + first) * size);
    }
    rows.end_block(last - first, s, out ? static_cast<char*>(out) + first * size : nullptr);
  }
  return rows;
}

Rows Rows::in_blocks(const void* const* pointers, const int64_t* widths, int64_t blocks, int64_t tasks, int dtype,
                     const int64_t* problem_of, int64_t problems, void* const* out) {
  Rows rows(tasks, dtype, problems);
  if (!rows.valid() || blocks < 0) return rows;
  rows.reserve(blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t t = 0; t < tasks; ++t) {
      if (pointers[t * blocks + b]) rows.add_row(t, pointers[t * blocks + b]);
    }
    rows.end_block(widths[b], problem_of ? problem_of[b] : 0, out ? out[b] : nullptr);
  }
  return rows;
}

// Blocks point into these vectors, which must not move any more.
void Rows::reserve(int64_t blocks) {
  pointers_.reserve(static_cast<size_t>(blocks * tasks_));
  present_.reserve(static_cast<size_t>(blocks * tasks_));
  blocks_.reserve(static_cast<size_t>(blocks));
}

void Rows::add_row(int64_t t, const void* row) {
  pointers_.push_back(row);
  present_.push_back(t);
}

void Rows::end_block(int64_t width, int64_t problem, void* out) {
  const size_t count = pointers_.size() - begun_;
  blocks_.push_back(
      {pointers_.data() + begun_, present_.data() + begun_, static_cast<int64_t>(count), width, problem, out});
  begun_ += count;
  width_ += width;
}

std::vector<Piece> plan(const Rows& rows) {
  const int64_t columns = chunk_columns(rows.tasks(), rows.width());
  std::vector<Piece> pieces;
  pieces.reserve(static_cast<size_t>(most_pieces(rows.blocks().size(), rows.tasks(), rows.width())));
  for (const Block& block : rows.blocks()) {
    for (int64_t a = 0; a < block.width; a += columns) {
      pieces.push_back({&block, {a, a + columns < block.width ? a + columns : block.width}});
    }
  }
  return pieces;
}

}  // namespace fpg
