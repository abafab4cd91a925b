// mix: J <- C J in place.
#include "launch.h"

namespace fpg {

template <class Row, int R>
__global__ void __launch_bounds__(kThreads, 2) mix_kernel(const __grid_constant__ MixJob job) {
  mix_all<Row, vectors_of(R), R>(job, reinterpret_cast<Accumulator<Row>*>(shared_memory()));
}

template <class Row, int P>
__global__ void __launch_bounds__(kThreads, 2) mix_tensor_kernel(const __grid_constant__ MixJob job) {
  mix_tensor<Row, P>(job);
}

template <class Row>
__global__ void __launch_bounds__(kThreads, 2) mix_tiles_kernel(const __grid_constant__ MixJob job) {
  mix_tiles<Row>(job);
}

template <auto kKernel>
struct Kernel {
  static constexpr auto value = kKernel;
};

int start_mix(const Device& device, const MixJob& job, int dtype, void* stream) {
  const int64_t tasks = job.rows.tasks;
  return with_row_type(dtype, [&](auto type) {
    using Row = typename decltype(type)::type;
    if (tasks <= kMostRowsHeld) {
      return with_rows_held(tasks, [&](auto held) {
        constexpr int kRows = decltype(held)::value;
        const int64_t shared_bytes = tasks * tasks * static_cast<int64_t>(sizeof(Accumulator<Row>));
        return run<mix_kernel<Row, kRows>>(device, job.plan.items, shared_bytes, false, stream, job);
      });
    }
    // By strips if they fit the device's shared memory.
    int strips = rows_of_strips(tasks, sizeof(Row));
    if (mix_many_bytes(tasks, sizeof(Row), strips) > device.shared_per_block) strips = 0;
    const int64_t shared_bytes = mix_many_bytes(tasks, sizeof(Row), strips);
    const auto start_as = [&](auto kernel) {
      return run<decltype(kernel)::value>(device, job.plan.items, shared_bytes, false, stream, job);
    };
    if constexpr (!kIsDouble<Row>) {
      if (strips == 16) return start_as(Kernel<mix_tensor_kernel<Row, 16>>());
      if (strips == 32) return start_as(Kernel<mix_tensor_kernel<Row, 32>>());
      if (strips == 64) return start_as(Kernel<mix_tensor_kernel<Row, 64>>());
    }
    return start_as(Kernel<mix_tiles_kernel<Row>>());
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
