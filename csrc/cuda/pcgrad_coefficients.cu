// pcgrad_coefficients: PCGrad's projections on Gram matrices, a warp a row.
#include "launch.h"

namespace fpg {

// Two blocks a multiprocessor, by registers: for the sake of more some would be spilled.
__global__ void __launch_bounds__(kThreads, 2) solve_kernel(const __grid_constant__ OrderedJob job) { solve(job); }

}  // namespace fpg

int fpg_cuda_pcgrad_coefficients(const double* gram, int64_t tasks, int64_t segments, const int64_t* order,
                                 int order_kind, int self_projection, double eps, double min_squared_norm,
                                 double* coefficients, void* stream) {
  if (!fpg::is_valid(tasks, 0, FPG_F64, segments)) return FPG_BAD_ARGUMENT;
  const fpg::Projection projection = {self_projection != 0, eps, min_squared_norm};
  fpg::OrderedJob job = {{gram, order, false, projection, tasks, segments, coefficients, nullptr, 1.0}, false, {}};
  if (!fpg::take_order(job, order_kind)) return FPG_BAD_ARGUMENT;
  fpg::Device device = {};
  int error = fpg::find_device(&device);
  if (error == 0) {
    const int64_t block_count = fpg::divide_up(segments * tasks, fpg::kWarps);
    error = fpg::run<fpg::solve_kernel>(device, block_count, fpg::solve_bytes(tasks), false, stream, job);
  }
  return fpg::status_of(error);
}
