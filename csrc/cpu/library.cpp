// The C ABI of the CPU library: plans the chunks, spreads them over threads, reduces in fixed order.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "../fastpcgrad.h"
#include "../surgery_core.h"
#include "kernels.h"
#include "rows.h"
#include "threads.h"

namespace fpg {
namespace {

const Kernels* best_kernels() {
#ifdef FPG_HAVE_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return &kernels_avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return &kernels_avx2;
  }
#endif
  return &kernels_baseline;
}

const Kernels* kernels = best_kernels();

constexpr int64_t kWorkForThreads = 1 << 15;  // elements of J below which a second thread costs more than it gives

int threads_for(int64_t tasks, int64_t width, int64_t pieces, int threads) {
  if (tasks * width < kWorkForThreads) return 1;
  return static_cast<int>(pieces < threads ? pieces : threads);
}
int threads_for(const Rows& rows, const std::vector<Piece>& pieces, int threads) {
  return threads_for(rows.tasks(), rows.width(), static_cast<int64_t>(pieces.size()), threads);
}

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
    for_each_piece(there, threads, false, [&](int64_t k, void* own) {
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
    const bool safe = squared_norm >= kSafeSquaredNormMin && squared_norm <= kSafeSquaredNormMax;
    if (!safe && squared_norm != 0) return true;
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

// What gram takes besides its result, of rows in blocks.
int64_t workspace(const int64_t* widths, int64_t blocks, int64_t tasks, int thread_count) {
  const int64_t width = std::accumulate(widths, widths + blocks, int64_t{0});
  const int64_t pieces = most_pieces(blocks, tasks, width);
  const int used = threads_for(tasks, width, pieces, thread_count);
  return Rows::bytes(blocks, tasks) + pieces * static_cast<int64_t>(sizeof(Piece)) +
         pieces_of_wave(tasks, pieces, used) * pairs_of(tasks) * static_cast<int64_t>(sizeof(double)) +
         Threads::bytes(used, kernels->gram_scratch(tasks));
}

void gram(const Rows& rows, const std::vector<Piece>& pieces, double* result, int threads) {
  const int used = threads_for(rows, pieces, threads);
  gram_pass(rows, pieces, false, result, used);
  if (needs_wide(rows, result)) gram_pass(rows, pieces, true, result, used);
}

void solve(const double* gram, int64_t tasks, int64_t segments, const int64_t* order, bool order_per_segment,
           Projection projection, double* coefficients) {
  std::vector<double> dots(static_cast<size_t>(tasks));
  for (int64_t row = 0; row < segments * tasks; ++row) {
    const int64_t s = row / tasks, i = row % tasks;
    const int64_t* places = order + (order_per_segment ? row : i) * tasks;
    project_row(gram + s * tasks * tasks, places, tasks, i, projection, coefficients + row * tasks, dots.data(), 0, 1,
                [] {});
  }
}

bool unsafe_weights(const double* weights, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    const double magnitude = weights[k] < 0 ? -weights[k] : weights[k];
    if (magnitude > kSafeWeightMax || (magnitude < kSafeWeightMin && magnitude != 0)) return true;
  }
  return false;
}

// Results of this size go past the caches: what is written there would have to be read first, which costs more than the
// next reader gains by finding some of it. A row that is written over has just been read, so its lines are there.
constexpr int64_t kStreamBytes = 2 << 20;

bool is_row(const void* out, const Block& block) {
  return std::find(block.rows, block.rows + block.count, out) != block.rows + block.count;
}

// `weights` [count, T]: each block takes those of its problem.
void combine(const Rows& rows, const std::vector<Piece>& pieces, const double* weights, int64_t count, int threads) {
  const int64_t tasks = rows.tasks();
  const bool wide = unsafe_weights(weights, count * tasks);
  const auto kernel = kernels->combine[rows.dtype()][wide];
  const bool large = rows.width() * rows.row_bytes() >= kStreamBytes;
  const Threads used(threads_for(rows, pieces, threads), tasks * static_cast<int64_t>(sizeof(double)));
  for_each_piece(static_cast<int64_t>(pieces.size()), used, true, [&](int64_t k, void* memory) {
    const Piece& piece = pieces[static_cast<size_t>(k)];
    const Block& block = *piece.block;
    if (block.count == 0) return;
    double* own = static_cast<double*>(memory);
    for (int64_t i = 0; i < block.count; ++i) own[i] = weights[block.problem * tasks + block.tasks[i]];
    kernel(block.rows, block.count, piece.chunk, own, block.out, large && !is_row(block.out, block));
  });
}

void mix(const Rows& rows, const std::vector<Piece>& pieces, const double* coefficients, int threads) {
  const int64_t tasks = rows.tasks();
  const bool wide = unsafe_weights(coefficients, rows.problems() * tasks * tasks);
  const auto kernel = kernels->mix[rows.dtype()][wide];
  const Threads used(threads_for(rows, pieces, threads), kernels->mix_scratch(tasks));
  for_each_piece(static_cast<int64_t>(pieces.size()), used, true, [&](int64_t k, void* memory) {
    const Piece& piece = pieces[static_cast<size_t>(k)];
    kernel(const_cast<void* const*>(piece.block->rows), tasks, piece.chunk,
           coefficients + piece.block->problem * tasks * tasks, memory);
  });
}

// Of one block, whose pieces they are; sums [2, width].
void sign_sums(const Rows& rows, const double* weights, void* sums, int threads) {
  const std::vector<Piece> pieces = plan(rows);
  const auto kernel = kernels->sign_sums[rows.dtype()];
  void* negative = static_cast<char*>(sums) + rows.width() * (rows.dtype() == FPG_F64 ? 8 : 4);
  const Threads used(threads_for(rows, pieces, threads), rows.tasks() * static_cast<int64_t>(sizeof(double)));
  for_each_piece(static_cast<int64_t>(pieces.size()), used, false, [&](int64_t k, void* memory) {
    const Piece& piece = pieces[static_cast<size_t>(k)];
    double* own = static_cast<double*>(memory);
    for (int64_t i = 0; i < piece.block->count; ++i) own[i] = weights ? weights[piece.block->tasks[i]] : 1.0;
    kernel(piece.block->rows, piece.block->count, piece.chunk, own, sums, negative);
  });
}

void trimmed_mean(const Rows& rows, SortingNetwork network, int64_t trim, int threads) {
  const std::vector<Piece> pieces = plan(rows);
  const auto kernel = kernels->trimmed_mean[rows.dtype()];
  const Threads used(threads_for(rows, pieces, threads), kernels->trimmed_mean_scratch(rows.tasks()));
  for_each_piece(static_cast<int64_t>(pieces.size()), used, false, [&](int64_t k, void* memory) {
    const Piece& piece = pieces[static_cast<size_t>(k)];
    kernel(piece.block->rows, piece.block->count, rows.tasks(), piece.chunk, network, trim, piece.block->out, memory);
  });
}

// The surgery of `rows`: merged to their `out`, or mixed in place.
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

// Makes the rows and works on them. No exception crosses the C ABI.
template <class Make, class Body>
int guarded(Make make, Body body) {
  try {
    const Rows rows = make();
    if (!rows.valid()) return FPG_BAD_ARGUMENT;
    body(rows);
    return FPG_OK;
  } catch (const std::bad_alloc&) {
    return FPG_OUT_OF_MEMORY;
  }
}

}  // namespace
}  // namespace fpg

using fpg::Rows;

int fpg_abi_version(void) { return FPG_ABI_VERSION; }

const char* fpg_cpu_isa(void) { return fpg::kernels->isa; }

int fpg_cpu_use_isa(const char* name) {
  // Better sets contain the lesser ones, so this machine runs all up to its best.
  const fpg::Kernels* best = fpg::best_kernels();
  const fpg::Kernels* known[] = {
      &fpg::kernels_baseline,
#ifdef FPG_HAVE_X86_ISAS
      &fpg::kernels_avx2,
      &fpg::kernels_avx512,
#endif
  };
  for (const fpg::Kernels* candidate : known) {
    if (std::strcmp(candidate->isa, name) == 0) {
      fpg::kernels = candidate;
      return FPG_OK;
    }
    if (candidate == best) break;
  }
  return FPG_BAD_ARGUMENT;
}

int fpg_cpu_gram(const void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype, const int64_t* offsets,
                 int64_t segments, double* gram, int threads) {
  return fpg::guarded([&] { return Rows::packed(grads, tasks, width, row_stride, dtype, offsets, segments); },
                      [&](const Rows& rows) { fpg::gram(rows, fpg::plan(rows), gram, threads); });
}

int fpg_cpu_gram_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks, int dtype,
                        const int64_t* problem_of, int64_t problems, double* gram, int threads) {
  return fpg::guarded([&] { return Rows::in_blocks(rows, widths, blocks, tasks, dtype, problem_of, problems); },
                      [&](const Rows& found) { fpg::gram(found, fpg::plan(found), gram, threads); });
}

int64_t fpg_cpu_workspace_blocks(const int64_t* widths, int64_t blocks, int64_t tasks, int threads) {
  return tasks > 0 ? fpg::workspace(widths, blocks, tasks, threads) : 0;
}

int fpg_cpu_pcgrad_coefficients(const double* gram, int64_t tasks, int64_t segments, const int64_t* order,
                                int order_per_segment, int self_projection, double eps, double min_squared_norm,
                                double* coefficients, int /*threads*/) {
  const fpg::Projection projection{self_projection != 0, eps, min_squared_norm};
  return fpg::guarded(
      [&] { return Rows(tasks, FPG_F64, segments); },
      [&](const Rows&) { fpg::solve(gram, tasks, segments, order, order_per_segment != 0, projection, coefficients); });
}

int fpg_cpu_combine(const void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                    const int64_t* offsets, int64_t segments, const double* weights, void* out, int threads) {
  return fpg::guarded([&] { return Rows::packed(grads, tasks, width, row_stride, dtype, offsets, segments, out); },
                      [&](const Rows& rows) { fpg::combine(rows, fpg::plan(rows), weights, segments, threads); });
}

int fpg_cpu_combine_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks, int dtype,
                           const int64_t* weights_of, int64_t count, const double* weights, void* const* out,
                           int threads) {
  return fpg::guarded([&] { return Rows::in_blocks(rows, widths, blocks, tasks, dtype, weights_of, count, out); },
                      [&](const Rows& found) { fpg::combine(found, fpg::plan(found), weights, count, threads); });
}

int fpg_cpu_mix(void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype, const int64_t* offsets,
                int64_t segments, const double* coefficients, int threads) {
  return fpg::guarded([&] { return Rows::packed(grads, tasks, width, row_stride, dtype, offsets, segments); },
                      [&](const Rows& rows) { fpg::mix(rows, fpg::plan(rows), coefficients, threads); });
}

int fpg_cpu_pcgrad(void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype, const int64_t* offsets,
                   int64_t segments, const int64_t* order, int order_per_segment, int self_projection, double eps,
                   double min_squared_norm, double scale, double* gram, double* coefficients, double* weights,
                   void* out, int threads) {
  const fpg::Projection projection{self_projection != 0, eps, min_squared_norm};
  return fpg::guarded([&] { return Rows::packed(grads, tasks, width, row_stride, dtype, offsets, segments, out); },
                      [&](const Rows& rows) {
                        fpg::pcgrad(rows, order, order_per_segment != 0, projection, scale, gram, coefficients, weights,
                                    out == nullptr, threads);
                      });
}

int fpg_cpu_pcgrad_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks, int dtype,
                          const int64_t* order, int self_projection, double eps, double min_squared_norm, double scale,
                          double* gram, double* coefficients, double* weights, void* const* out, int threads) {
  const fpg::Projection projection{self_projection != 0, eps, min_squared_norm};
  return fpg::guarded([&] { return Rows::in_blocks(rows, widths, blocks, tasks, dtype, nullptr, 1, out); },
                      [&](const Rows& found) {
                        fpg::pcgrad(found, order, false, projection, scale, gram, coefficients, weights, false,
                                    threads);
                      });
}

int fpg_cpu_sign_sums(const void* const* rows, int64_t tasks, int64_t width, int dtype, const double* weights,
                      void* sums, int threads) {
  return fpg::guarded([&] { return Rows::in_blocks(rows, &width, 1, tasks, dtype, nullptr, 1); },
                      [&](const Rows& found) { fpg::sign_sums(found, weights, sums, threads); });
}

int fpg_cpu_trimmed_mean(const void* const* rows, int64_t tasks, int64_t width, int dtype, const int32_t* network,
                         int64_t comparators, int64_t trim, void* out, int threads) {
  const auto is_place = [&](int32_t place) { return place >= 0 && place < tasks; };
  if (trim < 0 || 2 * trim >= tasks || comparators < 0) return FPG_BAD_ARGUMENT;
  if (!std::all_of(network, network + 2 * comparators, is_place)) return FPG_BAD_ARGUMENT;
  return fpg::guarded([&] { return Rows::in_blocks(rows, &width, 1, tasks, dtype, nullptr, 1, &out); },
                      [&](const Rows& found) {
                        fpg::trimmed_mean(found, {network, network + comparators, comparators}, trim, threads);
                      });
}
