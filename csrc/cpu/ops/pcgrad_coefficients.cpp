// pcgrad_coefficients: PCGrad's projections on Gram matrices.
#include <cstdint>
#include <vector>

#include "ops.h"

namespace fpg {

void solve(const SolveJob& job) {
  const int64_t tasks = job.tasks;
  std::vector<double> dots(static_cast<size_t>(tasks));
  for (int64_t row = 0; row < job.problems * tasks; ++row) {
    const int64_t i = row % tasks;
    const int64_t* order = job.order + (job.order_per_problem ? row : i) * tasks;
    project_row(OneThread(), job.gram + row / tasks * tasks * tasks, order, tasks, i, job.projection,
                job.coefficients + row * tasks, dots.data());
  }
}

}  // namespace fpg

int fpg_cpu_pcgrad_coefficients(const double* gram, int64_t tasks, int64_t segments, const int64_t* order,
                                int order_per_segment, int self_projection, double eps, double min_squared_norm,
                                double* coefficients, int /*threads*/) {
  if (tasks <= 0 || segments < 0) return FPG_BAD_ARGUMENT;
  const fpg::SolveJob job = {gram,  order,    order_per_segment != 0, {self_projection != 0, eps, min_squared_norm},
                             tasks, segments, coefficients,           nullptr,
                             1.0};
  return fpg::guarded([&] {
    fpg::solve(job);
    return FPG_OK;
  });
}
