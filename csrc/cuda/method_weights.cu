// method_weights: the T x T problems of the methods, a warp an answer. Nothing is read back.
#include "../solvers/solvers.h"
#include "launch.h"
#include "warp_group.h"

namespace fpg {

template <class Method>
struct WeightsJob {
  SolverJob job;
  Method method;
  int64_t count;
  double* scratch;
};

// One block a multiprocessor, by registers: there are few, and for the sake of many some registers would be spilled.
template <class Method>
__global__ void __launch_bounds__(kSolverThreads, 1) weights_kernel(const __grid_constant__ WeightsJob<Method> given) {
  const int64_t each = scratch_doubles(given.method, given.job.tasks);
  const WarpGroup group = {thread_index() % 32};
  double* scratch = given.scratch + solver_warp() * each;
  for (int64_t k = solver_warp(); k < given.count; k += solver_warps()) {
    answer(group, given.method, given.job, k, scratch);
    group.sync();
  }
}

// Each warp of the grid has scratch memory of its own: no more of them than this.
constexpr int64_t kMostWarps = 1024;

template <class Method>
int64_t blocks_for(const Method& method, int64_t tasks, int64_t problems) {
  const int64_t count = problems * answers_of(method, tasks);
  return divide_up(count < kMostWarps ? count : kMostWarps, kSolverWarps);
}

}  // namespace fpg

int64_t fpg_cuda_method_workspace(int solver, int64_t tasks, int64_t problems) {
  int64_t bytes = -1;
  const double none[2] = {};
  fpg::with_solver(solver, none, [&](const auto& method) {
    bytes = fpg::blocks_for(method, tasks, problems) * fpg::kSolverWarps * fpg::scratch_doubles(method, tasks) *
            static_cast<int64_t>(sizeof(double));
    return static_cast<int>(FPG_OK);
  });
  return bytes;
}

int fpg_cuda_method_weights(int solver, const double* gram, int64_t tasks, int64_t problems, const double* parameters,
                            const double* preference, double* answers, void* workspace, void* stream) {
  if (!fpg::is_valid(tasks, 0, FPG_F64, problems)) return FPG_BAD_ARGUMENT;
  const fpg::SolverJob job = {gram, preference, answers, tasks, problems};
  return fpg::with_solver(solver, parameters, [&](const auto& method) {
    using Method = std::decay_t<decltype(method)>;
    const int64_t count = problems * fpg::answers_of(method, tasks);
    const fpg::WeightsJob<Method> given = {job, method, count, static_cast<double*>(workspace)};
    const int64_t block_count = fpg::blocks_for(method, tasks, problems);
    const int error =
        fpg::start(fpg::weights_kernel<Method>, block_count, fpg::kSolverThreads, 0, false, stream, given);
    return fpg::status_of(error);
  });
}
