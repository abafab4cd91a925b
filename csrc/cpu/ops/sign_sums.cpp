// sign_sums: in each column the weighted sums of the positive and of the negative entries.
#include <cstdint>

#include "ops.h"

using fpg::Rows;

int fpg_cpu_sign_sums(const void* const* rows, int64_t tasks, int64_t width, int dtype, const double* weights,
                      void* sums, int threads) {
  const auto make = [&] { return Rows::in_blocks(rows, &width, 1, tasks, dtype, nullptr, 1); };
  return fpg::with_rows(make, [&](const Rows& found) {
    const auto kernel = fpg::kernels->sign_sums[dtype];
    void* negative = static_cast<char*>(sums) + width * (dtype == FPG_F64 ? 8 : 4);
    const int64_t bytes = tasks * static_cast<int64_t>(sizeof(double));
    fpg::for_each_piece(found, fpg::plan(found), threads, bytes, false, [&](const fpg::Piece& piece, void* memory) {
      const fpg::Block& block = *piece.block;
      double* own = static_cast<double*>(memory);
      for (int64_t i = 0; i < block.count; ++i) own[i] = weights ? weights[block.tasks[i]] : 1.0;
      kernel(block.rows, block.count, piece.chunk, own, sums, negative);
    });
  });
}
