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

struct Rows {
  const void* data;
  int64_t tasks;
  int64_t width;
  int64_t stride;
  int dtype;
  const int64_t* offsets;
  int64_t segments;

  int64_t first(int64_t s) const { return offsets ? offsets[s] : 0; }
  int64_t last(int64_t s) const { return offsets ? offsets[s + 1] : width; }
  bool valid() const { return dtype >= 0 && dtype < kRowTypes && tasks > 0 && width >= 0 && segments >= 0; }
};

struct Piece {
  int64_t segment;
  Chunk chunk;
};

// Chunks depend on the problem alone, never on the threads: so does the order of every sum.
constexpr int64_t kMinChunk = 1 << 14;  // columns
constexpr int64_t kChunkQuantum = 1024;
constexpr int64_t kWorkForThreads = 1 << 15;  // elements of J below which a second thread costs more than it gives

int64_t chunk_columns(const Rows& rows) {
  const int64_t chunks = rows.tasks <= 32 ? 256 : 64;  // bounds the memory of the partial sums
  const int64_t columns = (rows.width + chunks - 1) / chunks;
  const int64_t rounded = (columns + kChunkQuantum - 1) / kChunkQuantum * kChunkQuantum;
  return rounded < kMinChunk ? kMinChunk : rounded;
}

std::vector<Piece> plan(const Rows& rows) {
  const int64_t columns = chunk_columns(rows);
  std::vector<Piece> pieces;
  for (int64_t s = 0; s < rows.segments; ++s) {
    for (int64_t a = rows.first(s); a < rows.last(s); a += columns) {
      pieces.push_back({s, {a, a + columns < rows.last(s) ? a + columns : rows.last(s)}});
    }
  }
  return pieces;
}

int threads_for(const Rows& rows, int64_t pieces, int threads) {
  if (rows.tasks * rows.width < kWorkForThreads) return 1;
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

void reduce(const std::vector<Piece>& pieces, const std::vector<double>& partial, const Rows& rows, double* gram) {
  const int64_t tasks = rows.tasks, pairs = tasks * (tasks + 1) / 2;
  std::vector<double> sums(static_cast<size_t>(pairs));
  size_t k = 0;
  for (int64_t s = 0; s < rows.segments; ++s) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (; k < pieces.size() && pieces[k].segment == s; ++k) {
      const double* from = partial.data() + k * static_cast<size_t>(pairs);
      for (int64_t pair = 0; pair < pairs; ++pair) sums[static_cast<size_t>(pair)] += from[pair];
    }
    double* matrix = gram + s * tasks * tasks;
    const double* next = sums.data();
    for (int64_t i = 0; i < tasks; ++i) {
      for (int64_t j = 0; j <= i; ++j) matrix[i * tasks + j] = matrix[j * tasks + i] = *next++;
    }
  }
}

void gram_pass(const Rows& rows, const std::vector<Piece>& pieces, bool wide, double* gram, int threads) {
  const int64_t pairs = rows.tasks * (rows.tasks + 1) / 2;
  std::vector<double> partial(pieces.size() * static_cast<size_t>(pairs));
  const auto kernel = kernels->gram[rows.dtype][wide];
  for_each_piece(static_cast<int64_t>(pieces.size()), threads, kernels->gram_scratch(rows.tasks), false,
                 [&](int64_t k, void* memory) {
                   kernel(rows.data, rows.tasks, rows.stride, pieces[static_cast<size_t>(k)].chunk,
                          partial.data() + k * pairs, memory);
                 });
  reduce(pieces, partial, rows, gram);
}

// Whether some row's squares may have left the range in which fp32 products are exact enough. A squared norm of zero
// is the common case of an all-zero row: one look at the row tells it from underflow.
bool needs_wide(const Rows& rows, const double* gram) {
  if (rows.dtype == FPG_F64 || rows.width == 0) return false;
  const int64_t bytes = rows.dtype == FPG_F32 ? 4 : 2;
  for (int64_t s = 0; s < rows.segments; ++s) {
    for (int64_t t = 0; t < rows.tasks; ++t) {
      const double squared_norm = gram[(s * rows.tasks + t) * rows.tasks + t];
      if (squared_norm >= kSafeSquaredNormMin && squared_norm <= kSafeSquaredNormMax) continue;
      if (squared_norm != 0) return true;
      const char* row = static_cast<const char*>(rows.data) + (t * rows.stride + rows.first(s)) * bytes;
      if (kernels->any_nonzero[rows.dtype](row, rows.last(s) - rows.first(s))) return true;
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

// Results beyond this size will not be read from a cache again.
constexpr int64_t kStreamBytes = 8 << 20;

void combine(const Rows& rows, const std::vector<Piece>& pieces, const double* weights, void* out, int threads) {
  const bool wide = unsafe_weights(weights, rows.segments * rows.tasks);
  const auto kernel = kernels->combine[rows.dtype][wide];
  const bool stream = rows.width * 4 > kStreamBytes;
  const int used = threads_for(rows, static_cast<int64_t>(pieces.size()), threads);
  for_each_piece(static_cast<int64_t>(pieces.size()), used, 0, true, [&](int64_t k, void*) {
    const Piece& piece = pieces[static_cast<size_t>(k)];
    kernel(rows.data, rows.tasks, rows.stride, piece.chunk, weights + piece.segment * rows.tasks, out, stream);
  });
}

void mix(const Rows& rows, const std::vector<Piece>& pieces, const double* coefficients, int threads) {
  const int64_t tasks = rows.tasks;
  const bool wide = unsafe_weights(coefficients, rows.segments * tasks * tasks);
  const auto kernel = kernels->mix[rows.dtype][wide];
  const int used = threads_for(rows, static_cast<int64_t>(pieces.size()), threads);
  for_each_piece(static_cast<int64_t>(pieces.size()), used, kernels->mix_scratch(tasks), true,
                 [&](int64_t k, void* memory) {
                   const Piece& piece = pieces[static_cast<size_t>(k)];
                   kernel(const_cast<void*>(rows.data), tasks, rows.stride, piece.chunk,
                          coefficients + piece.segment * tasks * tasks, memory);
                 });
}

// No exception crosses the C ABI.
template <class Body>
int guarded(const Rows& rows, Body body) {
  if (!rows.valid()) return FPG_BAD_ARGUMENT;
  try {
    body();
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
  const Rows rows{grads, tasks, width, row_stride, dtype, offsets, segments};
  return fpg::guarded(rows, [&] { fpg::gram(rows, fpg::plan(rows), gram, threads); });
}

int fpg_cpu_pcgrad_coefficients(const double* gram, int64_t tasks, int64_t segments, const int64_t* order,
                                int order_per_segment, int self_projection, double eps, double min_squared_norm,
                                double* coefficients, int /*threads*/) {
  const Rows rows{gram, tasks, 0, 0, FPG_F64, nullptr, segments};
  const fpg::Projection projection{self_projection != 0, eps, min_squared_norm};
  return fpg::guarded(
      rows, [&] { fpg::solve(gram, tasks, segments, order, order_per_segment != 0, projection, coefficients); });
}

int fpg_cpu_combine(const void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                    const int64_t* offsets, int64_t segments, const double* weights, void* out, int threads) {
  const Rows rows{grads, tasks, width, row_stride, dtype, offsets, segments};
  return fpg::guarded(rows, [&] { fpg::combine(rows, fpg::plan(rows), weights, out, threads); });
}

int fpg_cpu_mix(void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype, const int64_t* offsets,
                int64_t segments, const double* coefficients, int threads) {
  const Rows rows{grads, tasks, width, row_stride, dtype, offsets, segments};
  return fpg::guarded(rows, [&] { fpg::mix(rows, fpg::plan(rows), coefficients, threads); });
}

int fpg_cpu_pcgrad(void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype, const int64_t* offsets,
                   int64_t segments, const int64_t* order, int order_per_segment, int self_projection, double eps,
                   double min_squared_norm, double scale, double* gram, double* coefficients, double* weights,
                   void* out, int threads) {
  const Rows rows{grads, tasks, width, row_stride, dtype, offsets, segments};
  const fpg::Projection projection{self_projection != 0, eps, min_squared_norm};
  return fpg::guarded(rows, [&] {
    const std::vector<fpg::Piece> pieces = fpg::plan(rows);
    fpg::gram(rows, pieces, gram, threads);
    fpg::solve(gram, tasks, segments, order, order_per_segment != 0, projection, coefficients);
    if (out == nullptr) return fpg::mix(rows, pieces, coefficients, threads);
    for (int64_t s = 0; s < segments; ++s) {
      for (int64_t k = 0; k < tasks; ++k) {
        weights[s * tasks + k] = fpg::merged_weight(coefficients + s * tasks * tasks, tasks, k, scale);
      }
    }
    fpg::combine(rows, pieces, weights, out, threads);
  });
}
