// method_weights: the T x T problems of the methods, one thread a problem.
#include <cstdint>

#include "../../solvers/solvers.h"
#include "ops.h"

int fpg_cpu_method_weights(int solver, const double* gram, int64_t tasks, int64_t problems, const double* parameters,
                           const double* preference, double* answers, int threads) {
  constexpr int64_t kLeastWork = 1 << 13;  // answers times T^2
  if (tasks <= 0 || problems < 0) return FPG_BAD_ARGUMENT;
  const fpg::SolverJob job = {gram, preference, answers, tasks, problems};
  return fpg::guarded([&] {
    return fpg::with_solver(solver, parameters, [&](const auto& method) {
      const int64_t count = problems * fpg::answers_of(method, tasks);
      const int64_t bytes = fpg::scratch_doubles(method, tasks) * static_cast<int64_t>(sizeof(double));
      const fpg::Threads used(fpg::threads_for(count * tasks * tasks, kLeastWork, count, threads), bytes);
      fpg::for_each_part(count, used, false, [&](int64_t k, void* scratch) {
        fpg::answer(fpg::OneThread(), method, job, k, static_cast<double*>(scratch));
      });
      return FPG_OK;
    });
  });
}
