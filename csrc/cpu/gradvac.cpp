// gradvac: GradVac's turns on Gram matrices, one thread a row.
#include <memory>
#include <new>

#include "../fastpcgrad.h"
#include "../solvers/gradvac.h"

int fpg_cpu_gradvac(const double* gram, const int64_t* places, int64_t tasks, int64_t problems, double beta, double eps,
                    double* targets, double* coefficients, int threads) {
  if (tasks <= 0 || problems < 0) return FPG_BAD_ARGUMENT;
  constexpr int64_t kWorkForThreads = 1 << 15;  // multiply-adds, below which a second thread costs more than it gives
  const int64_t rows = problems * tasks;
  if (rows < threads) threads = static_cast<int>(rows);
  if (rows * tasks * tasks < kWorkForThreads) threads = 1;
  if (threads < 1) return FPG_OK;
  const fpg::GradVacJob job = {gram, places, tasks, problems, beta, eps, targets, coefficients};
  const std::unique_ptr<double[]> products(new (std::nothrow) double[static_cast<size_t>(threads * tasks)]);
  if (!products) return FPG_OUT_OF_MEMORY;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < threads; ++part) {
    for (int64_t row = part; row < rows; row += threads) {
      fpg::vaccinate(fpg::OneThread(), job, row, products.get() + part * tasks);
    }
  }
  return FPG_OK;
}
