// mix: J <- C J in place.
#include "launch.h"

namespace fpg {

template <class Row, int R>
__global__ void __launch_bounds__(kThreads, 2) mix_kernel(const __grid_constant__ MixJob job) {
  mix_all<Row, vectors_of(R), R>(job, reinterpret_cast<double*>(shared_memory()));
}

template <class Row, int kColumns>
__global__ void __launch_bounds__(kThreads, 2) mix_tiles_kernel(const __grid_constant__ MixJob job) {
  mix_tiles<Row, kColumns>(job);
}

int start_mix(const Device& device, const MixJob& job, int dtype, void* stream) {
  const int64_t tasks = job.rows.tasks;
  return with_row_type(dtype, [&](auto type) {
    using Row = typename decltype(type)::type;
    if (tasks <= kMostRowsHeld) {
      return with_rows_held(tasks, [&](auto held) {
        constexpr int kRows = decltype(held)::value;
        const int64_t shared_bytes = tasks * tasks * static_cast<int64_t>(sizeof(double));
        return run<mix_kernel<Row, kRows>>(device, job.plan.items, shared_bytes, false, stream, job);
      });
    }
    const int64_t shared_bytes = mix_tile_bytes(tasks, sizeof(Row));
    if constexpr (!kIsDouble<Row>) {
      if (mix_columns(tasks, sizeof(Row)) == 4) {
        return run<mix_tiles_kernel<Row, 4>>(device, job.plan.items, shared_bytes, false, stream, job);
      }
    }
    return run<mix_tiles_kernel<Row, 1>>(device, job.plan.items, shared_bytes, false, stream, job);
  });
}

}  // namespace fpg

int fpg_cuda_mix(void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype, const int64_t* offsets,
                 int64_t segments, const double* coefficients, void* stream) {
  if (!fpg::is_valid(tasks, width, dtype, segments)) return FPG_BAD_ARGUMENT;
  const fpg::Rows rows = fpg::packed_rows(grads, tasks, width, row_stride, dtype, offsets, segments, nullptr);
  const fpg::Plan plan = fpg::columns_plan_of(rows, fpg::itemsize_of(dtype));
  fpg::Device device = {};
  int error = fpg::find_device(&device);
  if (error == 0) error = fpg::start_mix(device, {rows, plan, coefficients}, dtype, stream);
  return fpg::status_of(error);
}
