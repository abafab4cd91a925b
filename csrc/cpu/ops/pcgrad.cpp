// pcgrad: the whole surgery in one call.
#include <cstdint>
#include <vector>

#include "ops.h"

namespace fpg {
namespace {

// Merged to the `out` of the rows, or mixed in place.
void pcgrad(const Rows& rows, const int64_t* order, bool order_per_problem, Projection projection, double scale,
            double* matrices, double* coefficients, double* weights, bool in_place, int threads) {
  const std::vector<Piece> pieces = plan(rows);
  const int64_t tasks = rows.tasks(), problems = rows.problems();
  gram(rows, pieces, matrices, threads);
  solve(matrices, tasks, problems, order, order_per_problem, projection, coefficients);
  if (in_place) return mix(rows, pieces, coefficients, threads);
  for (int64_t s = 0; s < problems; ++s) {
    for (int64_t k = 0; k < tasks; ++k) {
      weights[s * tasks + k] = merged_weight(coefficients + s * tasks * tasks, tasks, k, scale);
    }
  }
  combine(rows, pieces, weights, problems, threads);
}

}  // namespace
}  // namespace fpg

using fpg::Rows;

int fpg_cpu_pcgrad(void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype, const int64_t* offsets,
                   int64_t segments, const int64_t* order, int order_per_segment, int self_projection, double eps,
                   double min_squared_norm, double scale, double* gram, double* coefficients, double* weights,
                   void* out, int threads) {
  const fpg::Projection projection{self_projection != 0, eps, min_squared_norm};
  return fpg::with_rows([&] { return Rows::packed(grads, tasks, width, row_stride, dtype, offsets, segments, out); },
                        [&](const Rows& rows) {
                          fpg::pcgrad(rows, order, order_per_segment != 0, projection, scale, gram, coefficients,
                                      weights, out == nullptr, threads);
                        });
}

int fpg_cpu_pcgrad_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks, int dtype,
                          const int64_t* order, int self_projection, double eps, double min_squared_norm, double scale,
                          double* gram, double* coefficients, double* weights, void* const* out, int threads) {
  const fpg::Projection projection{self_projection != 0, eps, min_squared_norm};
  return fpg::with_rows([&] { return Rows::in_blocks(rows, widths, blocks, tasks, dtype, nullptr, 1, out); },
                        [&](const Rows& found) {
                          fpg::pcgrad(found, order, false, projection, scale, gram, coefficients, weights, false,
                                      threads);
                        });
}
