// gradvac: GradVac's turns on Gram matrices, a warp a row. Nothing is read back.
#include "../solvers/gradvac.h"
#include "launch.h"
#include "warp_group.h"

namespace fpg {

// Shared memory for each warp: T doubles.
__global__ void __launch_bounds__(kSolverThreads) gradvac_kernel(const __grid_constant__ GradVacJob job) {
  const WarpGroup group = {thread_index() % 32};
  double* products = reinterpret_cast<double*>(shared_memory()) + thread_index() / 32 * job.tasks;
  for (int64_t row = solver_warp(); row < job.problems * job.tasks; row += solver_warps()) {
    vaccinate(group, job, row, products);
    group.sync();
  }
}

}  // namespace fpg

int fpg_cuda_gradvac(const double* gram, const int64_t* places, int64_t tasks, int64_t problems, double beta,
                     double eps, double* targets, double* coefficients, void* stream) {
  if (!fpg::is_valid(tasks, 0, FPG_F64, problems)) return FPG_BAD_ARGUMENT;
  const fpg::GradVacJob job = {gram, places, tasks, problems, beta, eps, targets, coefficients};
  const int64_t shared_bytes = fpg::kSolverWarps * tasks * static_cast<int64_t>(sizeof(double));
  const int64_t needed = fpg::divide_up(problems * tasks, fpg::kSolverWarps), most = 1 << 16;
  const int error = fpg::start(fpg::gradvac_kernel, needed < most ? needed : most, fpg::kSolverThreads, shared_bytes,
                               false, stream, job);
  return fpg::status_of(error);
}
