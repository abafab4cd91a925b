// pcgrad_coefficients: PCGrad's projections on Gram matrices.
#include <cstdint>
#include <vector>

#include "ops.h"

namespace fpg {

void solve(const double* gram, int64_t tasks, int64_t problems, const int64_t* order, bool order_per_problem,
           Projection projection, double* coefficients) {
  std::vector<double> dots(static_cast<size_t>(tasks));
  for (int64_t row = 0; row < problems * tasks; ++row) {
    const int64_t s = row / tasks, i = row % tasks;
    const int64_t* places = order + (order_per_problem ? row : i) * tasks;
    project_row(gram + s * tasks * tasks, places, tasks, i, projection, coefficients + row * tasks, dots.data(), 0, 1,
                [] {});
  }
}

}  // namespace fpg

int fpg_cpu_pcgrad_coefficients(const double* gram, int64_t tasks, int64_t segments, const int64_t* order,
                                int order_per_segment, int self_projection, double eps, double min_squared_norm,
                                double* coefficients, int /*threads*/) {
  if (tasks <= 0 || segments < 0) return FPG_BAD_ARGUMENT;
  const fpg::Projection projection{self_projection != 0, eps, min_squared_norm};
  return fpg::guarded([&] {
    fpg::solve(gram, tasks, segments, order, order_per_segment != 0, projection, coefficients);
    return FPG_OK;
  });
}
