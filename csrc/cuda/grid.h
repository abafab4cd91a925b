// What all blocks of a cooperative launch do together, waiting for each other in between. For the sources alone whose
// kernels do: CUDA's header takes longer to compile than some of them.
#pragma once

#include "finish.h"

#if !defined(FPG_EMULATION)

#include <cooperative_groups.h>

namespace fpg {
__device__ inline void sync_grid() { cooperative_groups::this_grid().sync(); }
}  // namespace fpg

#endif

namespace fpg {

// Does flagged rows again and sums their problems anew, by all blocks.
template <class Row, class J>
__device__ FPG_RARE void redo_flagged(const GramJob<J>& job) {
  for (int64_t item = block_index(); item < job.plan.items; item += blocks()) rescue<Row>(job, item);
  sync_grid();
  reduce(job, true);
  sync_grid();
}

// From partial Gram matrices to G, by all blocks of a cooperative launch. At the end G is visible to all.
template <class Row, class J>
__device__ inline void finish_gram(const GramJob<J>& job) {
  reduce(job, false);
  sync_grid();
  if constexpr (!kIsDouble<Row>) {
    if (job.guarded && any_flag(job.flags, job.rows.problems * job.rows.tasks)) redo_flagged<Row>(job);
  }
}

// From G to C and, if asked, to the weights, by all blocks.
__device__ inline void finish_solve(const OrderedJob& job) {
  solve(job);
  if (job.weights == nullptr) return;
  sync_grid();
  merge_weights(job);
}

}  // namespace fpg
