// gradvac: GradVac's turns on Gram matrices, one thread a row.
#include <cstdint>

#include "../../solvers/gradvac.h"
#include "ops.h"

int fpg_cpu_gradvac(const double* gram, const int64_t* places, int64_t tasks, int64_t problems, double beta, double eps,
                    double* targets, double* coefficients, int threads) {
  constexpr int64_t kLeastWork = 1 << 15;  // multiply-adds
  if (tasks <= 0 || problems < 0) return FPG_BAD_ARGUMENT;
  const fpg::GradVacJob job = {gram, places, tasks, problems, beta, eps, targets, coefficients};
  const int64_t rows = problems * tasks, bytes = tasks * static_cast<int64_t>(sizeof(double));
  return fpg::guarded([&] {
    const fpg::Threads used(fpg::threads_for(rows * tasks * tasks, kLeastWork, rows, threads), bytes);
    fpg::for_each_part(rows, used, false, [&](int64_t row, void* products) {
      fpg::vaccinate(fpg::OneThread(), job, row, static_cast<double*>(products));
    });
    return FPG_OK;
  });
}
