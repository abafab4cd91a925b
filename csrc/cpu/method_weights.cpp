// method_weights: the T x T problems of the methods, one thread a problem.
#include <memory>
#include <new>

#include "../solvers/solvers.h"

namespace fpg {
namespace {

constexpr int64_t kWorkForThreads = 1 << 13;  // of answers times T^2, below which a second thread costs more

template <class Method>
void solve_all(const Method& method, const SolverJob& job, int threads) {
  const int64_t count = job.problems * answers_of(method, job.tasks);
  if (count < threads) threads = static_cast<int>(count);
  if (count * job.tasks * job.tasks < kWorkForThreads) threads = 1;
  if (threads < 1) return;
  const int64_t each = scratch_doubles(method, job.tasks);
  const std::unique_ptr<double[]> scratch(new double[static_cast<size_t>(each * threads)]);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < threads; ++part) {
    for (int64_t k = part; k < count; k += threads) answer(OneThread(), method, job, k, scratch.get() + part * each);
  }
}

}  // namespace
}  // namespace fpg

int fpg_cpu_method_weights(int solver, const double* gram, int64_t tasks, int64_t problems, const double* parameters,
                           const double* preference, double* answers, int threads) {
  if (tasks <= 0 || problems < 0) return FPG_BAD_ARGUMENT;
  const fpg::SolverJob job = {gram, preference, answers, tasks, problems};
  try {
    return fpg::with_solver(solver, parameters, [&](const auto& method) {
      fpg::solve_all(method, job, threads);
      return static_cast<int>(FPG_OK);
    });
  } catch (const std::bad_alloc&) {
    return FPG_OUT_OF_MEMORY;
  }
}
