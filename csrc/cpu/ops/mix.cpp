// mix: J <- C J, in place.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops.h"

namespace fpg {

void mix(const Rows& rows, const std::vector<Piece>& pieces, const double* coefficients, int threads) {
  const int64_t tasks = rows.tasks(), square = tasks * tasks;
  const bool wide = std::any_of(coefficients, coefficients + rows.problems() * square, unsafe_weight);
  const auto kernel = kernels->mix[rows.dtype()][wide];
  for_each_piece(rows, pieces, threads, kernels->mix_scratch(tasks), true, [&](const Piece& piece, void* memory) {
    const Block& block = *piece.block;
    kernel(const_cast<void* const*>(block.rows), tasks, piece.chunk, coefficients + block.problem * square, memory);
  });
}

}  // namespace fpg

using fpg::Rows;

int fpg_cpu_mix(void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype, const int64_t* offsets,
                int64_t segments, const double* coefficients, int threads) {
  return fpg::with_rows([&] { return Rows::packed(grads, tasks, width, row_stride, dtype, offsets, segments); },
                        [&](const Rows& rows) { fpg::mix(rows, fpg::plan(rows), coefficients, threads); });
}
