// A warp as the group that solves a T x T problem together (../solvers/group.h).
#pragma once

#include "../solvers/group.h"
#include "platform.h"

namespace fpg {

// Small blocks, so that a few problems find a multiprocessor each.
constexpr int kSolverWarps = 2, kSolverThreads = 32 * kSolverWarps;

__device__ inline int64_t solver_warp() { return block_index() * kSolverWarps + thread_index() / 32; }
__device__ inline int64_t solver_warps() { return blocks() * kSolverWarps; }

// Sum over a warp, the same in all lanes.
__device__ inline double warp_sum(double value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

struct WarpGroup {
  static constexpr int lanes = 32;
  int lane;

  __device__ void sync() const { sync_warp(); }
  __device__ double sum(double mine) const { return warp_sum(mine); }
  __device__ double highest(double mine) const {
    for (int mask = 16; mask > 0; mask /= 2) {
      const double other = shuffle_xor(mine, mask);
      if (other > mine) mine = other;
    }
    return mine;
  }
  // The first where several are lowest. An index is exact as a double.
  __device__ void lowest(double* value, int64_t* index) const {
    double place = static_cast<double>(*index);
    for (int mask = 16; mask > 0; mask /= 2) {
      const double other = shuffle_xor(*value, mask), other_place = shuffle_xor(place, mask);
      if (other < *value || (other == *value && other_place < place)) {
        *value = other;
        place = other_place;
      }
    }
    *index = static_cast<int64_t>(place);
  }
};

}  // namespace fpg
