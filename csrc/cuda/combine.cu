// combine: w J.
#include "blocks.h"
#include "launch.h"

namespace fpg {

// Blocks for whose registers a multiprocessor is to have room: of float64 rows two, for with three some spill.
template <class Row>
constexpr int kCombineBlocks = kIsDouble<Row> ? 2 : 3;
template <class Row, int R, class J>
__global__ void __launch_bounds__(kThreads, kCombineBlocks<Row>)
    combine_kernel(const __grid_constant__ CombineJob<J> job) {
  combine_all<Row, vectors_of(R), R>(job, reinterpret_cast<Accumulator<Row>*>(shared_memory()));
}

// More rows than a thread holds. Each block reads so many rows that fewer blocks at a time are faster, and so are
// weights that are converted where they are used.
template <class Row, class J>
__global__ void __launch_bounds__(kThreads, 2) combine_many_kernel(const __grid_constant__ CombineJob<J> job) {
  combine_all<Row, 1, kMostRowsHeld>(job, reinterpret_cast<double*>(shared_memory()));
}

template <class J>
int start_combine(const Device& device, CombineJob<J> job, int dtype, void* stream) {
  if (job.plan.items == 0) return 0;
  const int64_t tasks = job.rows.tasks;
  const int64_t shared_bytes = shared_memory_of(job.rows, tasks * static_cast<int64_t>(sizeof(double)));
  return with_row_type(dtype, [&](auto type) {
    using Row = typename decltype(type)::type;
    if (tasks > kMostRowsHeld) {
      return run<combine_many_kernel<Row, J>>(device, job.plan.items, shared_bytes, false, stream, job);
    }
    return with_rows_held(tasks, [&](auto held) {
      constexpr int kRows = decltype(held)::value;
      return run<combine_kernel<Row, kRows, J>>(device, job.plan.items, shared_bytes, false, stream, job);
    });
  });
}
template int start_combine(const Device&, CombineJob<Rows>, int, void*);
template int start_combine(const Device&, CombineJob<BlockRows>, int, void*);

}  // namespace fpg

int fpg_cuda_combine(const void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                     const int64_t* offsets, int64_t segments, const double* weights, void* out, void* stream) {
  if (!fpg::is_valid(tasks, width, dtype, segments)) return FPG_BAD_ARGUMENT;
  const fpg::Rows rows = fpg::packed_rows(grads, tasks, width, row_stride, dtype, offsets, segments, out);
  const fpg::Plan plan = fpg::columns_plan_of(rows, fpg::itemsize_of(dtype));
  fpg::Device device = {};
  int error = fpg::find_device(&device);
  if (error == 0) error = fpg::start_combine<fpg::Rows>(device, {rows, plan, weights}, dtype, stream);
  return fpg::status_of(error);
}

int fpg_cuda_combine_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks, int dtype,
                            const int64_t* weights_of, int64_t count, const double* weights, void* const* out,
                            void* workspace, void* stream) {
  return fpg::with_blocks({rows, widths, blocks, tasks, dtype, weights_of, count, out}, workspace, stream,
                          [&](const fpg::Device& device, const fpg::BlockRows& found, void*) {
                            const fpg::Plan plan = fpg::columns_plan_of(found, fpg::itemsize_of(dtype));
                            return fpg::start_combine<fpg::BlockRows>(device, {found, plan, weights}, dtype, stream);
                          });
}
