// combine: w J.
#include "launch.h"

namespace fpg {

template <class Row, int R>
__global__ void __launch_bounds__(kThreads, 2) combine_kernel(const __grid_constant__ CombineJob job) {
  combine_all<Row, vectors_of(R), R>(job, reinterpret_cast<double*>(shared_memory()));
}

int start_combine(const Device& device, const CombineJob& job, int dtype, void* stream) {
  const int64_t tasks = job.rows.tasks;
  return with_row_type(dtype, [&](auto type) {
    using Row = typename decltype(type)::type;
    return with_rows_held(tasks, [&](auto held) {
      constexpr int kRows = decltype(held)::value;
      const int64_t shared_bytes = tasks * static_cast<int64_t>(sizeof(double));
      return run<combine_kernel<Row, kRows>>(device, job.plan.items, shared_bytes, false, stream, job);
    });
  });
}

}  // namespace fpg

int fpg_cuda_combine(const void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                     const int64_t* offsets, int64_t segments, const double* weights, void* out, void* stream) {
  if (!fpg::is_valid(tasks, width, dtype, segments)) return FPG_BAD_ARGUMENT;
  const int64_t itemsize = fpg::itemsize_of(dtype);
  fpg::Rows rows = {const_cast<void*>(grads), static_cast<int>(tasks), width, row_stride, offsets, segments, false};
  rows.aligned = fpg::is_aligned(rows, itemsize, out);
  fpg::Device device = {};
  int error = fpg::find_device(&device);
  if (error == 0) {
    const fpg::Plan plan = fpg::columns_plan(tasks, width, segments, itemsize);
    error = fpg::start_combine(device, {rows, plan, weights, out}, dtype, stream);
  }
  return fpg::status_of(error);
}
