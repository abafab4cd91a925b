// Small problems spread over threads, each thread with scratch memory of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "../fastpcgrad.h"

namespace fpg {

// body(k, scratch of this thread) for k < count; a fpg_status. One thread does it where `work` is below `least_work`.
template <class Body>
int for_each_problem(int64_t count, int64_t work, int64_t least_work, int threads, int64_t scratch_doubles, Body body) {
  if (count < threads) threads = static_cast<int>(count);
  if (work < least_work) threads = 1;
  if (threads < 1) return FPG_OK;
  const std::unique_ptr<double[]> scratch(new (std::nothrow) double[static_cast<size_t>(scratch_doubles * threads)]);
  if (!scratch) return FPG_OUT_OF_MEMORY;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < threads; ++part) {
    for (int64_t k = part; k < count; k += threads) body(k, scratch.get() + part * scratch_doubles);
  }
  return FPG_OK;
}

}  // namespace fpg
