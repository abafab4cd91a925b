// trimmed_mean: in each column the mean of the entries but for the largest and the smallest ones.
#include <algorithm>
#include <cstdint>

#include "ops.h"

using fpg::Rows;

int fpg_cpu_trimmed_mean(const void* const* rows, int64_t tasks, int64_t width, int dtype, const int32_t* network,
                         int64_t comparators, int64_t trim, void* out, int threads) {
  const auto is_place = [&](int32_t place) { return place >= 0 && place < tasks; };
  if (trim < 0 || 2 * trim >= tasks || comparators < 0) return FPG_BAD_ARGUMENT;
  if (!std::all_of(network, network + 2 * comparators, is_place)) return FPG_BAD_ARGUMENT;
  const fpg::SortingNetwork sorting = {network, network + comparators, comparators};
  const auto make = [&] { return Rows::in_blocks(rows, &width, 1, tasks, dtype, nullptr, 1); };
  return fpg::with_rows(make, [&](const Rows& found) {
    const auto kernel = fpg::kernels->trimmed_mean[dtype];
    const int64_t bytes = fpg::kernels->trimmed_mean_scratch(tasks);
    fpg::for_each_piece(found, fpg::plan(found), threads, bytes, false, [&](const fpg::Piece& piece, void* memory) {
      const fpg::Block& block = *piece.block;
      kernel(block.rows, block.count, tasks, piece.chunk, sorting, trim, out, memory);
    });
  });
}
