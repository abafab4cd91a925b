// combine: w J.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops.h"

namespace fpg {
namespace {

// Results of this size go past the caches: what is written there would have to be read first, which costs more than the
// next reader gains by finding some of it. A row that is written over has just been read, so its lines are there.
constexpr int64_t kStreamBytes = 2 << 20;

bool is_row(const void* out, const Block& block) {
  return std::find(block.rows, block.rows + block.count, out) != block.rows + block.count;
}

}  // namespace

void combine(const Rows& rows, const std::vector<Piece>& pieces, const double* weights, int64_t count, int threads) {
  const int64_t tasks = rows.tasks();
  const bool wide = std::any_of(weights, weights + count * tasks, unsafe_weight);
  const auto kernel = kernels->combine[rows.dtype()][wide];
  const bool large = rows.width() * rows.row_bytes() >= kStreamBytes;
  const int64_t bytes = tasks * static_cast<int64_t>(sizeof(double));
  for_each_piece(rows, pieces, threads, bytes, true, [&](const Piece& piece, void* memory) {
    const Block& block = *piece.block;
    if (block.count == 0) return;
    double* own = static_cast<double*>(memory);
    for (int64_t i = 0; i < block.count; ++i) own[i] = weights[block.problem * tasks + block.tasks[i]];
    kernel(block.rows, block.count, piece.chunk, own, block.out, large && !is_row(block.out, block));
  });
}

}  // namespace fpg

using fpg::Rows;

int fpg_cpu_combine(const void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                    const int64_t* offsets, int64_t segments, const double* weights, void* out, int threads) {
  return fpg::with_rows([&] { return Rows::packed(grads, tasks, width, row_stride, dtype, offsets, segments, out); },
                        [&](const Rows& rows) { fpg::combine(rows, fpg::plan(rows), weights, segments, threads); });
}

int fpg_cpu_combine_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks, int dtype,
                           const int64_t* weights_of, int64_t count, const double* weights, void* const* out,
                           int threads) {
  return fpg::with_rows([&] { return Rows::in_blocks(rows, widths, blocks, tasks, dtype, weights_of, count, out); },
                        [&](const Rows& found) { fpg::combine(found, fpg::plan(found), weights, count, threads); });
}
