// The C ABI of the CPU library: plans the chunks, spreads them over threads, reduces in fixed order.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include <omp.h>

#include "../fastpcgrad.h"
#include "../surgery_core.h"
#include "kernels.h"

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

// Columns whose rows each lie in one piece. Rows that are all zero are left out.
struct Block {
  const void* const* rows;  // of the tasks that are there
  const int64_t* tasks;     // which those are, ascending
  int64_t count;
  int64_t width;
  int64_t problem;  // the matrix that it counts for, -1: none; the weights that it is combined with
  void* out;
};

// J as blocks, whichever way it came.
class Rows {
 public:
  Rows(int64_t tasks, int dtype, int64_t problems) : tasks_(tasks), dtype_(dtype), problems_(problems) {}

  static Rows packed(const void* data, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                     const int64_t* offsets, int64_t segments, void* out = nullptr) {
    Rows rows(tasks, dtype, segments);
    if (!rows.valid() || width < 0) return rows;
    rows.reserve(segments);
    const int64_t size = kRowBytes[dtype];
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t first = offsets ? offsets[s] : 0, last = offsets ? offsets[s + 1] : width;
      for (int64_t t = 0; t < tasks; ++t) {
        rows.add_row(t, static_cast<const char*>(data) + (t * row_stride + first) * size);
      }
      rows.end_block(last - first, s, out ? static_cast<char*>(out) + first * size : nullptr);
    }
    return rows;
  }

  static Rows in_blocks(const void* const* pointers, const int64_t* widths, int64_t blocks, int64_t tasks, int dtype,
                        const int64_t* problem_of, int64_t problems, void* const* out = nullptr) {
    Rows rows(tasks, dtype, problems);
    if (!rows.valid() || blocks < 0) return rows;
    rows.reserve(blocks);
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t t = 0; t < tasks; ++t) {
        if (pointers[t * blocks + b]) rows.add_row(t, pointers[t * blocks + b]);
      }
      rows.end_block(widths[b], problem_of ? problem_of[b] : 0, out ? out[b] : nullptr);
    }
    return rows;
  }

  bool valid() const { return dtype_ >= 0 && dtype_ < kRowTypes && tasks_ > 0 && problems_ >= 0; }
  int64_t tasks() const { return tasks_; }
  int64_t pairs() const { return tasks_ * (tasks_ + 1) / 2; }
  int dtype() const { return dtype_; }
  int64_t row_bytes() const { return kRowBytes[dtype_]; }
  int64_t problems() const { return problems_; }
  int64_t width() const { return width_; }
  const std::vector<Block>& blocks() const { return blocks_; }

 private:
  static constexpr int64_t kRowBytes[kRowTypes] = {4, 2, 2, 8};  // in the order of fpg_dtype

  // Blocks point into these vectors, which must not move any more.
  void reserve(int64_t blocks) {
    pointers_.reserve(static_cast<size_t>(blocks * tasks_));
    present_.reserve(static_cast<size_t>(blocks * tasks_));
    blocks_.reserve(static_cast<size_t>(blocks));
  }
  void add_row(int64_t t, const void* row) {
    pointers_.push_back(row);
    present_.push_back(t);
  }
  void end_block(int64_t width, int64_t problem, void* out) {
    const size_t count = pointers_.size() - begun_;
    blocks_.push_back(
        {pointers_.data() + begun_, present_.data() + begun_, static_cast<int64_t>(count), width, problem, out});
    begun_ += count;
    width_ += width;
  }

  int64_t tasks_;
  int dtype_;
  int64_t problems_;
  int64_t width_ = 0;
  size_t begun_ = 0;
  std::vector<const void*> pointers_;
  std::vector<int64_t> present_;
  std::vector<Block> blocks_;
};

struct Piece {
  const Block* block;
  Chunk chunk;
};

// Chunks depend on the problem alone, never on the threads: so does the order of every sum.
constexpr int64_t kMinChunk = 1 << 14;  // columns
constexpr int64_t kChunkQuantum = 1024;
constexpr int64_t kWorkForThreads = 1 << 15;  // elements of J below which a second thread costs more than it gives

int64_t chunk_columns(const Rows& rows) {
  const int64_t chunks = rows.tasks() <= 32 ? 256 : 64;  // bounds the memory of the partial sums
  const int64_t columns = (rows.width() + chunks - 1) / chunks;
  const int64_t rounded = (columns + kChunkQuantum - 1) / kChunkQuantum * kChunkQuantum;
  return rounded < kMinChunk ? kMinChunk : rounded;
}

std::vector<Piece> plan(const Rows& rows) {
  const int64_t columns = chunk_columns(rows);
  std::vector<Piece> pieces;
  for (const Block& block : rows.blocks()) {
    for (int64_t a = 0; a < block.width; a += columns) {
      pieces.push_back({&block, {a, a + columns < block.width ? a + columns : block.width}});
    }
  }
  return pieces;
}

int threads_for(const Rows& rows, int64_t pieces, int threads) {
  if (rows.tasks() * rows.width() < kWorkForThreads) return 1;
  return static_cast<int>(pieces < threads ? pieces : threads);
}

struct FreeAligned {
  void operator()(void* memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<void, FreeAligned>;

Scratch scratch(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
  return Scratch(memory);
}

// Runs body(k, memory of this thread) for k = 0..count-1, backwards if asked.
template <class Body>
void for_each_piece(int64_t count, int threads, int64_t scratch_bytes, bool backwards, Body body) {
  // Each thread's memory is taken before the parallel region, which no exception may leave.
  const int64_t stride = (scratch_bytes + 63) / 64 * 64;
  const Scratch memory = scratch(stride * threads + 64);
  if (threads <= 1) {
    for (int64_t k = 0; k < count; ++k) body(backwards ? count - 1 - k : k, memory.get());
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    void* own = static_cast<char*>(memory.get()) + stride * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t k = 0; k < count; ++k) body(backwards ? count - 1 - k : k, own);
  }
}

// Adds the pieces' triangles, each of which spans the tasks of its block, in the order of the pieces.
void reduce(const std::vector<Piece>& pieces, const std::vector<double>& partial, const Rows& rows, double* gram) {
  const int64_t tasks = rows.tasks();
  std::fill(gram, gram + rows.problems() * tasks * tasks, 0.0);
  for (size_t k = 0; k < pieces.size(); ++k) {
    const Block& block = *pieces[k].block;
    if (block.problem < 0) continue;  // whose piece was not computed
    double* matrix = gram + block.problem * tasks * tasks;
    const double* next = partial.data() + k * static_cast<size_t>(rows.pairs());
    for (int64_t i = 0; i < block.count; ++i) {
      for (int64_t j = 0; j <= i; ++j) matrix[block.tasks[i] * tasks + block.tasks[j]] += *next++;
    }
  }
  for (int64_t s = 0; s < rows.problems(); ++s) {
    double* matrix = gram + s * tasks * tasks;
    for (int64_t i = 0; i < tasks; ++i) {
      for (int64_t j = 0; j < i; ++j) matrix[j * tasks + i] = matrix[i * tasks + j];
    }
  }
}

void gram_pass(const Rows& rows, const std::vector<Piece>& pieces, bool wide, double* gram, int threads) {
  std::vector<double> partial(pieces.size() * static_cast<size_t>(rows.pairs()));
  const auto kernel = kernels->gram[rows.dtype()][wide];
  for_each_piece(static_cast<int64_t>(pieces.size()), threads, kernels->gram_scratch(rows.tasks()), false,
                 [&](int64_t k, void* memory) {
                   const Piece& piece = pieces[static_cast<size_t>(k)];
                   if (piece.block->problem < 0 || piece.block->count == 0) return;
                   kernel(piece.block->rows, piece.block->count, piece.chunk, partial.data() + k * rows.pairs(),
                          memory);
                 });
  reduce(pieces, partial, rows, gram);
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

void gram(const Rows& rows, const std::vector<Piece>& pieces, double* result, int threads) {
  const int used = threads_for(rows, static_cast<int64_t>(pieces.size()), threads);
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
  const int used = threads_for(rows, static_cast<int64_t>(pieces.size()), threads);
  const int64_t scratch_bytes = tasks * static_cast<int64_t>(sizeof(double));
  for_each_piece(static_cast<int64_t>(pieces.size()), used, scratch_bytes, true, [&](int64_t k, void* memory) {
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
  const int used = threads_for(rows, static_cast<int64_t>(pieces.size()), threads);
  for_each_piece(static_cast<int64_t>(pieces.size()), used, kernels->mix_scratch(tasks), true,
                 [&](int64_t k, void* memory) {
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
  const int used = threads_for(rows, static_cast<int64_t>(pieces.size()), threads);
  const int64_t scratch_bytes = rows.tasks() * static_cast<int64_t>(sizeof(double));
  for_each_piece(static_cast<int64_t>(pieces.size()), used, scratch_bytes, false, [&](int64_t k, void* memory) {
    const Piece& piece = pieces[static_cast<size_t>(k)];
    double* own = static_cast<double*>(memory);
    for (int64_t i = 0; i < piece.block->count; ++i) own[i] = weights ? weights[piece.block->tasks[i]] : 1.0;
    kernel(piece.block->rows, piece.block->count, piece.chunk, own, sums, negative);
  });
}

void trimmed_mean(const Rows& rows, SortingNetwork network, int64_t trim, int threads) {
  const std::vector<Piece> pieces = plan(rows);
  const auto kernel = kernels->trimmed_mean[rows.dtype()];
  const int used = threads_for(rows, static_cast<int64_t>(pieces.size()), threads);
  for_each_piece(static_cast<int64_t>(pieces.size()), used, kernels->trimmed_mean_scratch(rows.tasks()), false,
                 [&](int64_t k, void* memory) {
                   const Piece& piece = pieces[static_cast<size_t>(k)];
                   kernel(piece.block->rows, piece.block->count, rows.tasks(), piece.chunk, network, trim,
                          piece.block->out, memory);
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
