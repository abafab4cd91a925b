// pcgrad_coefficients: PCGrad's projections on Gram matrices.
#include <cstdint>

#include "ops.h"

namespace fpg {
namespace {

// Multiplications that take about half a millisecond: those of some 128 tasks.
constexpr int64_t kLeastWork = 1 << 21;

// C and v of one row. Vectors of AVX2 take half the time of SSE2's, and without FMA, which this target lacks, they give
// the same bits.
using ProjectRow = void (*)(const SolveJob& job, int64_t row, double* dots);

inline void project(const SolveJob& job, int64_t row, double* dots) {
  const int64_t tasks = job.tasks, i = row % tasks;
  const int64_t* order = job.order + (job.order_per_problem ? row : i) * tasks;
  project_row(OneThread(), job.gram + row / tasks * tasks * tasks, order, tasks, i, job.projection,
              job.coefficients + row * tasks, dots);
}

#ifdef FPG_HAVE_X86_ISAS
__attribute__((target("avx2"), flatten)) void project_by_avx2(const SolveJob& job, int64_t row, double* dots) {
  project(job, row, dots);
}

ProjectRow chosen() { return kernels == &kernels_baseline ? project : project_by_avx2; }
#else
ProjectRow chosen() { return project; }
#endif

}  // namespace

void solve(const SolveJob& job, int threads) {
  const int64_t tasks = job.tasks, rows = job.problems * tasks;
  const ProjectRow project_row = chosen();
  const Threads used(threads_for(rows * tasks * tasks, kLeastWork, rows, threads),
                     tasks * static_cast<int64_t>(sizeof(double)));
  for_each_part(used.count(), used, false, [&](int64_t first, void* dots) {
    for (int64_t row = first; row < rows; row += used.count()) project_row(job, row, static_cast<double*>(dots));
  });
}

}  // namespace fpg

int fpg_cpu_pcgrad_coefficients(const double* gram, int64_t tasks, int64_t segments, const int64_t* order,
                                int order_per_segment, int self_projection, double eps, double min_squared_norm,
                                double* coefficients, int threads) {
  if (tasks <= 0 || segments < 0) return FPG_BAD_ARGUMENT;
  const fpg::SolveJob job = {gram,  order,    order_per_segment != 0, {self_projection != 0, eps, min_squared_norm},
                             tasks, segments, coefficients,           nullptr,
                             1.0};
  return fpg::guarded([&] {
    fpg::solve(job, threads);
    return FPG_OK;
  });
}
