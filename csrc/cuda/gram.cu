// gram: partial Gram matrices, then their sum with whatever fp32 could not hold done again, in a launch of its own.
#include "launch.h"

namespace fpg {

template <class Row, int R>
__global__ void __launch_bounds__(kThreads, 2) gram_columns_kernel(const __grid_constant__ GramJob job) {
  gram_columns<Row, R, 0, vectors_of(R)>(job, block_index(), 0, 0, {nullptr, 0}, 0);
}

// Pairs of tiles change fastest: those that read the same columns run together, and one of them reads memory.
struct GramTilesJob {
  GramJob gram;
  int64_t tiles;
};
template <class Row, int G>
__global__ void __launch_bounds__(kThreads, 1) gram_tiles_kernel(const __grid_constant__ GramTilesJob job) {
  gram_tile<Row, G>(job.gram, block_index() / job.tiles, block_index() % job.tiles);
}

struct FinishJob {
  GramJob gram;
  SolveJob solve;  // without an order: none
};
template <class Row>
__global__ void __launch_bounds__(kThreads, 2) finish_kernel(const __grid_constant__ FinishJob job) {
  finish_gram<Row>(job.gram);
  if (job.solve.order != nullptr) finish_solve(job.solve);
}

int start_gram(const Device& device, const GramJob& job, int dtype, void* stream) {
  const int64_t tasks = job.rows.tasks;
  return with_row_type(dtype, [&](auto type) {
    using Row = typename decltype(type)::type;
    if (tasks <= kMostRowsHeld) {
      return with_rows_held(tasks, [&](auto held) {
        constexpr int kRows = decltype(held)::value;
        return run<gram_columns_kernel<Row, kRows>>(device, job.plan.items, column_tile_bytes(kRows, 0), false, stream,
                                                    job);
      });
    }
    return with_groups<Row>(tasks, [&](auto groups) {
      constexpr int kGroups = decltype(groups)::value;
      const GramTilesJob tiles = {job, tile_pairs(tasks, sizeof(Row))};
      return run<gram_tiles_kernel<Row, kGroups>>(device, job.plan.items * tiles.tiles, gram_tile_bytes<kGroups>(),
                                                  false, stream, tiles);
    });
  });
}

int start_finish(const Device& device, const GramJob& job, const SolveJob& solve, int dtype, void* stream) {
  const int64_t tasks = job.rows.tasks;
  return with_row_type(dtype, [&](auto type) {
    using Row = typename decltype(type)::type;
    // All the blocks that fit where a rescue may have to read J again; else one for each sum that a warp makes.
    const int64_t sums = divide_up(job.rows.segments * pair_index(tasks, 0), kWarps);
    const int64_t most = job.guarded ? INT64_MAX : sums;
    return run<finish_kernel<Row>>(device, most, solve_bytes(tasks), true, stream, FinishJob{job, solve});
  });
}

// The workspace: partial Gram matrices, then the flags.
GramJob gram_job(const Rows& rows, int dtype, double* gram, void* workspace) {
  const Plan plan = gram_plan(rows.tasks, rows.width, rows.segments, itemsize_of(dtype));
  double* partials = static_cast<double*>(workspace);
  int* flags = reinterpret_cast<int*>(partials + plan.items * pair_index(rows.tasks, 0));
  // The squares of fp16 never leave fp32's range, and float64 rows have no wider one to go to.
  return {rows, plan, partials, flags, gram, dtype == FPG_F32 || dtype == FPG_BF16};
}

}  // namespace fpg

int64_t fpg_cuda_workspace(int64_t tasks, int64_t width, int64_t segments, int dtype) {
  if (!fpg::is_valid(tasks, width, dtype, segments)) return 0;
  const fpg::Plan plan = fpg::gram_plan(tasks, width, segments, fpg::itemsize_of(dtype));
  return plan.items * fpg::pair_index(tasks, 0) * static_cast<int64_t>(sizeof(double)) +
         segments * tasks * static_cast<int64_t>(sizeof(int));
}

int fpg_cuda_gram(const void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                  const int64_t* offsets, int64_t segments, double* gram, void* workspace, void* stream) {
  if (!fpg::is_valid(tasks, width, dtype, segments)) return FPG_BAD_ARGUMENT;
  fpg::Rows rows = {const_cast<void*>(grads), static_cast<int>(tasks), width, row_stride, offsets, segments, false};
  rows.aligned = fpg::is_aligned(rows, fpg::itemsize_of(dtype), nullptr);
  const fpg::GramJob job = fpg::gram_job(rows, dtype, gram, workspace);
  fpg::Device device = {};
  int error = fpg::find_device(&device);
  if (error == 0) error = fpg::start_gram(device, job, dtype, stream);
  if (error == 0) error = fpg::start_finish(device, job, {}, dtype, stream);
  return fpg::status_of(error);
}
