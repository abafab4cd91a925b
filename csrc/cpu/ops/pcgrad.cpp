// pcgrad: the whole surgery in one call.
#include <cstdint>
#include <vector>

#include "ops.h"

namespace fpg {
namespace {

// Merged to the `out` of the rows, or mixed in place. `matrices`: the job's Gram matrices, to be written.
void pcgrad(const Rows& rows, const SolveJob& job, double* matrices, bool in_place, int threads) {
  const std::vector<Piece> pieces = plan(rows);
  const int64_t tasks = job.tasks;
  gram(rows, pieces, matrices, threads);
  solve(job, threads);
  if (in_place) return mix(rows, pieces, job.coefficients, threads);
  for (int64_t k = 0; k < job.problems * tasks; ++k) {
    job.weights[k] = merged_weight(job.coefficients + k / tasks * tasks * tasks, tasks, k % tasks, job.scale);
  }
  combine(rows, pieces, job.weights, job.problems, threads);
}

}  // namespace
}  // namespace fpg

using fpg::Rows;

int fpg_cpu_pcgrad(void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype, const int64_t* offsets,
                   int64_t segments, const int64_t* order, int order_per_segment, int self_projection, double eps,
                   double min_squared_norm, double scale, double* gram, double* coefficients, double* weights,
                   void* out, int threads) {
  const fpg::SolveJob job = {gram,  order,    order_per_segment != 0, {self_projection != 0, eps, min_squared_norm},
                             tasks, segments, coefficients,           weights,
                             scale};
  return fpg::with_rows([&] { return Rows::packed(grads, tasks, width, row_stride, dtype, offsets, segments, out); },
                        [&](const Rows& rows) { fpg::pcgrad(rows, job, gram, out == nullptr, threads); });
}

int fpg_cpu_pcgrad_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks, int dtype,
                          const int64_t* order, int self_projection, double eps, double min_squared_norm, double scale,
                          double* gram, double* coefficients, double* weights, void* const* out, int threads) {
  const fpg::SolveJob job = {gram,         order,   false, {self_projection != 0, eps, min_squared_norm}, tasks, 1,
                             coefficients, weights, scale};
  return fpg::with_rows([&] { return Rows::in_blocks(rows, widths, blocks, tasks, dtype, nullptr, 1, out); },
                        [&](const Rows& found) { fpg::pcgrad(found, job, gram, false, threads); });
}

int fpg_cpu_small_pcgrad(const fpg_small_pcgrad* call) {
  const int64_t square = call->tasks * call->tasks;
  const int64_t* order = reinterpret_cast<const int64_t*>(call + 1);
  const void* const* rows = reinterpret_cast<const void* const*>(order + square);
  return fpg_cpu_pcgrad_blocks(rows, call->widths, call->blocks, call->tasks, static_cast<int>(call->dtype), order,
                               call->self_projection != 0, call->eps, call->min_squared_norm, call->scale,
                               call->figures, call->figures + square, call->figures + 2 * square,
                               const_cast<void* const*>(rows), static_cast<int>(call->threads));
}
