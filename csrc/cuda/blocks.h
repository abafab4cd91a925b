// J in blocks, the host side: the tables that BlockRows points to.
//
// They are made anew for each call, since autograd makes new gradients for each step, and go to the device as kernel
// parameters: a small kernel writes its parameters to the workspace. So the caller's arrays are done with when the call
// returns, nothing is allocated, pinned or waited for, and a CUDA graph keeps the tables in its nodes. A copy from
// pageable memory could wait for the stream and cannot be captured; one from pinned memory needs that memory to outlive
// the copy, and in a graph every replay. A table of 4000 numbers takes one launch of about two microseconds.
#pragma once

#include <algorithm>
#include <new>
#include <vector>

#include "launch.h"

namespace fpg {

// What the entry points are given, all in the host's memory.
struct GivenBlocks {
  const void* const* rows;
  const int64_t* widths;
  int64_t blocks;
  int64_t tasks;
  int dtype;
  const int64_t* problem_of;
  int64_t problems;
  void* const* out;

  bool valid() const { return is_valid(tasks, blocks, dtype, 1) && problems >= 0; }
  int64_t problem(int64_t b) const { return problem_of == nullptr ? 0 : problem_of[b]; }
};

// Blocks of a problem become neighbours; those without columns, rows or a problem are left out.
class BlockTable {
 public:
  explicit BlockTable(const GivenBlocks& given) : given_(given) {
    for (int64_t b = 0; b < given.blocks; ++b) {
      if (given.widths[b] > 0 && given.problem(b) >= 0 && has_rows(b)) chosen_.push_back(b);
    }
    if (given.problem_of != nullptr) {
      std::stable_sort(chosen_.begin(), chosen_.end(),
                       [&](int64_t a, int64_t b) { return given.problem(a) < given.problem(b); });
    }
    const int64_t count = blocks(), itemsize = itemsize_of(given.dtype);
    const int64_t step = columns_step(given.tasks, itemsize);
    words_.resize(static_cast<size_t>(number_of_words(count, given.tasks, given.problems)));
    // The places of the tables, as in rows() below.
    uint64_t *firsts = words_.data(), *lasts = firsts + count + 1, *problem = lasts + count;
    uint64_t *first_block = problem + count, *out = first_block + given.problems + 1, *addresses = out + count;
    int64_t problems_begun = 0;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t b = chosen_[static_cast<size_t>(k)], owner = given.problem(b);
      const uint64_t back = static_cast<uint64_t>(width_ * itemsize);
      firsts[k] = static_cast<uint64_t>(width_);
      lasts[k] = static_cast<uint64_t>(width_ + given.widths[b]);
      problem[k] = static_cast<uint64_t>(owner);
      out[k] = moved(given.out == nullptr ? nullptr : given.out[b], back);
      for (int64_t t = 0; t < given.tasks; ++t) {
        addresses[k * given.tasks + t] = moved(given.rows[t * given.blocks + b], back);
      }
      while (problems_begun <= owner) first_block[problems_begun++] = static_cast<uint64_t>(k);
      width_ += divide_up(given.widths[b], step) * step;
    }
    firsts[count] = static_cast<uint64_t>(width_);
    while (problems_begun <= given.problems) first_block[problems_begun++] = static_cast<uint64_t>(count);
  }

  const std::vector<uint64_t>& words() const { return words_; }

  // With the words at `place` on the device.
  BlockRows rows(const void* place) const {
    const int64_t count = blocks();
    const int64_t *firsts = static_cast<const int64_t*>(place), *lasts = firsts + count + 1, *problem = lasts + count;
    const int64_t* first_block = problem + count;
    const uint64_t* out = reinterpret_cast<const uint64_t*>(first_block + given_.problems + 1);
    return {static_cast<int>(given_.tasks),
            count,
            width_,
            given_.problems,
            firsts,
            lasts,
            problem,
            first_block,
            out,
            out + count,
            0};
  }

  static int64_t number_of_words(int64_t blocks, int64_t tasks, int64_t problems) {
    return (4 + tasks) * blocks + problems + 2;
  }

 private:
  bool has_rows(int64_t b) const {
    for (int64_t t = 0; t < given_.tasks; ++t) {
      if (given_.rows[t * given_.blocks + b] != nullptr) return true;
    }
    return false;
  }
  int64_t blocks() const { return static_cast<int64_t>(chosen_.size()); }
  // A null stays one.
  static uint64_t moved(const void* row, uint64_t back) {
    return row == nullptr ? 0 : static_cast<uint64_t>(reinterpret_cast<uintptr_t>(row)) - back;
  }

  const GivenBlocks given_;
  std::vector<int64_t> chosen_;
  int64_t width_ = 0;
  std::vector<uint64_t> words_;
};

// Queues the copy of words to the device; a cudaError_t.
int upload(const Device& device, const std::vector<uint64_t>& words, void* to, void* stream);

// body(device, BlockRows, what is left of the workspace) gives a cudaError_t; this a status.
template <class Body>
int with_blocks(const GivenBlocks& given, void* workspace, void* stream, Body body) {
  if (!given.valid()) return FPG_BAD_ARGUMENT;
  Device device = {};
  if (const int error = find_device(&device)) return status_of(error);
  try {
    const BlockTable table(given);
    int error = upload(device, table.words(), workspace, stream);
    if (error == 0)
      error = body(device, table.rows(workspace), static_cast<uint64_t*>(workspace) + table.words().size());
    return status_of(error);
  } catch (const std::bad_alloc&) {  // no exception crosses the C ABI
    return FPG_OUT_OF_MEMORY;
  }
}

}  // namespace fpg
