// gram: the products of all pairs of rows, chunk by chunk, and their sums in a fixed order.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "ops.h"

namespace fpg {
namespace {

// Pieces come in waves: their partial sums are made by all threads, and added by one in the order of the pieces. So the
// memory does not grow with the pieces, of which each parameter has one at least, and no bit depends on the waves. In
// nearly all cases there is one; where there are more, a thread should have several pieces of each, for it waits for
// the others at the end.
constexpr int64_t kPartialSums = 1 << 20;  // numbers
constexpr int64_t kPiecesOfThread = 8;

int64_t pieces_of_wave(int64_t tasks, int64_t pieces, int threads) {
  const int64_t most = std::max(kPartialSums / pairs_of(tasks), kPiecesOfThread * threads);
  return std::min(most, pieces);
}

// Adds a piece's triangle, which spans the tasks of its block, to the lower triangle of its problem's matrix.
void add_piece(const Block& block, const double* partial, int64_t tasks, double* gram) {
  if (block.problem < 0) return;  // it was not computed
  double* matrix = gram + block.problem * tasks * tasks;
  for (int64_t i = 0; i < block.count; ++i) {
    for (int64_t j = 0; j <= i; ++j) matrix[block.tasks[i] * tasks + block.tasks[j]] += *partial++;
  }
}

void gram_pass(const Rows& rows, const std::vector<Piece>& pieces, bool wide, double* gram, int thread_count) {
  const int64_t tasks = rows.tasks(), pairs = pairs_of(tasks), count = static_cast<int64_t>(pieces.size());
  const int64_t wave = pieces_of_wave(tasks, count, thread_count);
  const std::unique_ptr<double[]> partial(new double[static_cast<size_t>(wave * pairs)]);
  const Threads threads(thread_count, kernels->gram_scratch(tasks));
  const auto kernel = kernels->gram[rows.dtype()][wide];
  std::fill(gram, gram + rows.problems() * tasks * tasks, 0.0);
  for (int64_t first = 0; first < count; first += wave) {
    const Piece* of_wave = pieces.data() + first;
    const int64_t there = std::min(wave, count - first);
    for_each_part(there, threads, false, [&](int64_t k, void* own) {
      const Block& block = *of_wave[k].block;
      if (block.problem < 0 || block.count == 0) return;
      kernel(block.rows, block.count, of_wave[k].chunk, partial.get() + k * pairs, own);
    });
    for (int64_t k = 0; k < there; ++k) add_piece(*of_wave[k].block, partial.get() + k * pairs, tasks, gram);
  }
  for (int64_t s = 0; s < rows.problems(); ++s) {
    double* matrix = gram + s * tasks * tasks;
    for (int64_t i = 0; i < tasks; ++i) {
      for (int64_t j = 0; j < i; ++j) matrix[j * tasks + i] = matrix[i * tasks + j];
    }
  }
}

// Whether some row's squares may have left the range in which fp32 products are exact enough. A squared norm of zero
// is the common case of an all-zero row: one look at the row tells it from underflow.
bool needs_wide(const Rows& rows, const double* gram) {
  if (rows.dtype() == FPG_F64) return false;
  const int64_t tasks = rows.tasks();
  for (int64_t diagonal = 0; diagonal < rows.problems() * tasks; ++diagonal) {
    const double squared_norm = gram[diagonal * tasks + diagonal % tasks];
    if (!safe_squared_norm(squared_norm) && squared_norm != 0) return true;
  }
  for (const Block& block : rows.blocks()) {
    for (int64_t i = 0; block.problem >= 0 && i < block.count; ++i) {
      const int64_t t = block.tasks[i];
      if (gram[(block.problem * tasks + t) * tasks + t] != 0) continue;
      if (kernels->any_nonzero[rows.dtype()](block.rows[i], block.width)) return true;
    }
  }
  return false;
}

}  // namespace

void gram(const Rows& rows, const std::vector<Piece>& pieces, double* result, int threads) {
  const int used = threads_for_pieces(rows.tasks(), rows.width(), static_cast<int64_t>(pieces.size()), threads);
  gram_pass(rows, pieces, false, result, used);
  if (needs_wide(rows, result)) gram_pass(rows, pieces, true, result, used);
}

}  // namespace fpg

using fpg::Rows;

int fpg_cpu_gram(const void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype, const int64_t* offsets,
                 int64_t segments, double* gram, int threads) {
  return fpg::with_rows([&] { return Rows::packed(grads, tasks, width, row_stride, dtype, offsets, segments); },
                        [&](const Rows& rows) { fpg::gram(rows, fpg::plan(rows), gram, threads); });
}

int fpg_cpu_gram_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks, int dtype,
                        const int64_t* problem_of, int64_t problems, double* gram, int threads) {
  return fpg::with_rows([&] { return Rows::in_blocks(rows, widths, blocks, tasks, dtype, problem_of, problems); },
                        [&](const Rows& found) { fpg::gram(found, fpg::plan(found), gram, threads); });
}

// What gram takes besides its result is the most that any of them does.
int64_t fpg_cpu_workspace_blocks(const int64_t* widths, int64_t blocks, int64_t tasks, int threads) {
  if (tasks <= 0) return 0;
  int64_t width = 0;
  for (int64_t b = 0; b < blocks; ++b) width += widths[b];
  const int64_t pieces = fpg::most_pieces(blocks, tasks, width);
  const int used = fpg::threads_for_pieces(tasks, width, pieces, threads);
  return Rows::bytes(blocks, tasks) + pieces * static_cast<int64_t>(sizeof(fpg::Piece)) +
         fpg::pieces_of_wave(tasks, pieces, used) * fpg::pairs_of(tasks) * static_cast<int64_t>(sizeof(double)) +
         fpg::Threads::bytes(used, fpg::kernels->gram_scratch(tasks));
}
