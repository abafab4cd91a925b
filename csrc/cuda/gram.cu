// gram: partial Gram matrices, then their sum with whatever fp32 could not hold done again, in a launch of its own.
#include "blocks.h"
#include "gram_tensor.h"
#include "grid.h"
#include "launch.h"

namespace fpg {

// Two rows ahead of time came slower than as they are asked for, by more threads; of more rows it is the other way.
template <int R>
constexpr bool kIsStreamed = R > 2;
template <int R>
constexpr int kGramColumnsBytes =
    column_sums_bytes(R, 0) + (kIsStreamed<R> ? Ring<column_vectors(R, 0, vectors_of(R))>::kBytes : 0);
// Blocks for whose registers a multiprocessor is to have room. Two rings of 8 rows fit into the shared memory of sm_90
// and sm_100 alone; elsewhere one block of float64 rows may have all registers, for with half of them some spill.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr bool kTwoRingsFit = false;
#else
constexpr bool kTwoRingsFit = true;
#endif
template <class Row, int R>
constexpr int kGramBlocks = !kIsStreamed<R>                             ? 4
                            : kIsDouble<Row> && R == 8 && !kTwoRingsFit ? 1
                                                                        : 2;
template <class Row, int R, class J>
__global__ void __launch_bounds__(kThreads, kGramBlocks<Row, R>)
    gram_columns_kernel(const __grid_constant__ GramJob<J> job) {
  Packed* vectors = reinterpret_cast<Packed*>(shared_memory() + column_sums_bytes(R, 0));
  gram_columns<Row, R, 0, vectors_of(R), kIsStreamed<R>>(job, block_index(), 0, 0,
                                                         reinterpret_cast<double*>(shared_memory()), {vectors}, 0);
}

// Tiles change fastest: those that read the same columns run together, and one of them reads memory.
template <class J>
struct GramTilesJob {
  GramJob<J> gram;
  int64_t tiles;
};
template <class Row, int G, bool kMany, class J>
__global__ void __launch_bounds__(kThreads, blocks_for_tiles(G))
    gram_tiles_kernel(const __grid_constant__ GramTilesJob<J> job) {
  gram_tile<Row, G, kMany>(job.gram, block_index() / job.tiles, block_index() % job.tiles);
}

template <class J>
struct FinishJob {
  GramJob<J> gram;
  OrderedJob solve;  // without an order: none
};
template <class Row, class J>
__global__ void __launch_bounds__(kThreads, 2) finish_kernel(const __grid_constant__ FinishJob<J> job) {
  finish_gram<Row>(job.gram);
  if (job.solve.order != nullptr) finish_solve(job.solve);
}

template <class J>
int start_gram(const Device& device, GramJob<J> job, int dtype, void* stream) {
  if (job.plan.items == 0) return 0;
  const int64_t tasks = job.rows.tasks;
  return with_row_type(dtype, [&](auto type) {
    using Row = typename decltype(type)::type;
    if (tasks <= kMostRowsHeld) {
      return with_rows_held(tasks, [&](auto held) {
        constexpr int kRows = decltype(held)::value;
        const int64_t shared_bytes = shared_memory_of(job.rows, kGramColumnsBytes<kRows>);
        return run<gram_columns_kernel<Row, kRows, J>>(device, job.plan.items, shared_bytes, false, stream, job);
      });
    }
    return with_tiles<Row>(tasks, [&](auto groups, auto many) {
      constexpr int kGroups = decltype(groups)::value;
      constexpr bool kMany = decltype(many)::value;
      const int64_t shared_bytes = shared_memory_of(job.rows, gram_tile_bytes<kGroups>());
      const GramTilesJob<J> tiles = {job, tiles_of_gram(tasks, sizeof(Row))};
      return run<gram_tiles_kernel<Row, kGroups, kMany, J>>(device, job.plan.items * tiles.tiles, shared_bytes, false,
                                                            stream, tiles);
    });
  });
}
template int start_gram(const Device&, GramJob<Rows>, int, void*);
template int start_gram(const Device&, GramJob<BlockRows>, int, void*);

template <class J>
int start_finish(const Device& device, GramJob<J> job, const OrderedJob& solve, int dtype, void* stream) {
  const int64_t tasks = job.rows.tasks;
  return with_row_type(dtype, [&](auto type) {
    using Row = typename decltype(type)::type;
    // All the blocks that fit where a rescue may have to read J again; else one for each sum that a warp makes.
    const int64_t sums = divide_up(job.rows.problems * pair_index(tasks, 0), kWarps);
    const int64_t most = job.guarded ? INT64_MAX : sums;
    const int64_t shared_bytes = shared_memory_of(job.rows, solve_bytes(tasks));
    return run<finish_kernel<Row, J>>(device, most, shared_bytes, true, stream, FinishJob<J>{job, solve});
  });
}
template int start_finish(const Device&, GramJob<Rows>, const OrderedJob&, int, void*);
template int start_finish(const Device&, GramJob<BlockRows>, const OrderedJob&, int, void*);

}  // namespace fpg

int64_t fpg_cuda_workspace(int64_t tasks, int64_t width, int64_t segments, int dtype) {
  if (!fpg::is_valid(tasks, width, dtype, segments)) return 0;
  const fpg::Plan plan = fpg::gram_plan(tasks, width, segments, fpg::itemsize_of(dtype));
  return fpg::gram_workspace(plan.items, tasks, segments);
}

int fpg_cuda_gram(const void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                  const int64_t* offsets, int64_t segments, double* gram, void* workspace, void* stream) {
  if (!fpg::is_valid(tasks, width, dtype, segments)) return FPG_BAD_ARGUMENT;
  const fpg::Rows rows = fpg::packed_rows(grads, tasks, width, row_stride, dtype, offsets, segments, nullptr);
  const fpg::GramJob<fpg::Rows> job = fpg::gram_job(rows, dtype, gram, workspace);
  fpg::Device device = {};
  int error = fpg::find_device(&device);
  if (error == 0) error = fpg::start_gram(device, job, dtype, stream);
  if (error == 0) error = fpg::start_finish(device, job, {}, dtype, stream);
  return fpg::status_of(error);
}

int fpg_cuda_gram_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks, int dtype,
                         const int64_t* problem_of, int64_t problems, double* gram, void* workspace, void* stream) {
  return fpg::with_blocks({rows, widths, blocks, tasks, dtype, problem_of, problems, nullptr}, workspace, stream,
                          [&](const fpg::Device& device, const fpg::BlockRows& found, void* rest) {
                            const auto job = fpg::gram_job(found, dtype, gram, rest);
                            int error = fpg::start_gram(device, job, dtype, stream);
                            if (error == 0) error = fpg::start_finish(device, job, {}, dtype, stream);
                            return error;
                          });
}
