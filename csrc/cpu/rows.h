// J as the CPU library walks it: blocks of columns, and the pieces of them that are one thread's work.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../fastpcgrad.h"
#include "kernels/kernels.h"

namespace fpg {

// Columns whose rows each lie in one piece. Rows that are all zero are left out.
struct Block {
  const void* const* rows;  // of the tasks that are there
  const int64_t* tasks;     // which those are, ascending
  int64_t count;
  int64_t width;
  int64_t problem;  // the matrix that it counts for, -1: none; the weights that it is combined with
  void* out;
};

inline int64_t pairs_of(int64_t tasks) { return tasks * (tasks + 1) / 2; }

// J as blocks, whichever way it came.
class Rows {
 public:
  static Rows packed(const void* data, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                     const int64_t* offsets, int64_t segments, void* out = nullptr);
  static Rows in_blocks(const void* const* pointers, const int64_t* widths, int64_t blocks, int64_t tasks, int dtype,
                        const int64_t* problem_of, int64_t problems, void* const* out = nullptr);

  bool valid() const { return dtype_ >= 0 && dtype_ < kRowTypes && tasks_ > 0 && problems_ >= 0; }
  int64_t tasks() const { return tasks_; }
  int dtype() const { return dtype_; }
  int64_t row_bytes() const { return kRowBytes[dtype_]; }
  int64_t problems() const { return problems_; }
  int64_t width() const { return width_; }
  const std::vector<Block>& blocks() const { return blocks_; }

  // What the tables of so many blocks take.
  static int64_t bytes(int64_t blocks, int64_t tasks) {
    const size_t of_block = sizeof(Block) + static_cast<size_t>(tasks) * (sizeof(void*) + sizeof(int64_t));
    return blocks * static_cast<int64_t>(of_block);
  }

 private:
  static constexpr int64_t kRowBytes[kRowTypes] = {4, 2, 2, 8};  // in the order of fpg_dtype

  Rows(int64_t tasks, int dtype, int64_t problems) : tasks_(tasks), dtype_(dtype), problems_(problems) {}
  void reserve(int64_t blocks);
  void add_row(int64_t t, const void* row);
  void end_block(int64_t width, int64_t problem, void* out);

  int64_t tasks_;
  int dtype_;
  int64_t problems_;
  int64_t width_ = 0;
  size_t begun_ = 0;
  std::vector<const void*> pointers_;
  std::vector<int64_t> present_;
  std::vector<Block> blocks_;
};

struct Piece {
  const Block* block;
  Chunk chunk;
};

// Chunks depend on the problem alone, never on the threads: so does the order of every sum.
constexpr int64_t kMinChunk = 1 << 14;  // columns
constexpr int64_t kChunkQuantum = 1024;

inline int64_t chunk_columns(int64_t tasks, int64_t width) {
  const int64_t chunks = tasks <= 32 ? 256 : 64;  // fewer of more rows, whose partial sums are large
  const int64_t columns = (width + chunks - 1) / chunks;
  const int64_t rounded = (columns + kChunkQuantum - 1) / kChunkQuantum * kChunkQuantum;
  return rounded < kMinChunk ? kMinChunk : rounded;
}

// A block has one piece more than whole chunks at most.
inline int64_t most_pieces(int64_t blocks, int64_t tasks, int64_t width) {
  return blocks + width / chunk_columns(tasks, width);
}

std::vector<Piece> plan(const Rows& rows);

}  // namespace fpg
