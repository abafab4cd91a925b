// What a build for one instruction set offers: the work on one chunk of columns, for each row type and accumulator.
#pragma once

#include <cstdint>

namespace fpg {

constexpr int kRowTypes = 4;  // fpg_dtype

// Columns [first, last) of rows. All work on a chunk is sequential: how chunks are spread over threads changes no bit.
struct Chunk {
  int64_t first;
  int64_t last;
};

// Pairs of places to compare and exchange in turn, after which the entries are sorted.
struct SortingNetwork {
  const int32_t* low;
  const int32_t* high;
  int64_t size;
};

struct Kernels {
  const char* isa;

  // Bytes of 64-byte-aligned scratch that one thread needs for a chunk of gram, of mix, of trimmed_mean.
  int64_t (*gram_scratch)(int64_t tasks);
  int64_t (*mix_scratch)(int64_t tasks);
  int64_t (*trimmed_mean_scratch)(int64_t tasks);

  // rows [T]: where each row begins; they need not lie in one piece of memory.
  // Index [wide]: 0 accumulates in the type that the rows ask for, 1 in float64 throughout.
  // partial [T (T + 1) / 2]: the lower triangle, row by row.
  void (*gram[kRowTypes][2])(const void* const* rows, int64_t tasks, Chunk chunk, double* partial, void* scratch);
  // `out` may be one of the rows. stream: bypass the caches on the way out.
  void (*combine[kRowTypes][2])(const void* const* rows, int64_t tasks, Chunk chunk, const double* weights, void* out,
                                bool stream);
  void (*mix[kRowTypes][2])(void* const* rows, int64_t tasks, Chunk chunk, const double* coefficients, void* scratch);
  // positive, negative: of the accumulator's type.
  void (*sign_sums[kRowTypes])(const void* const* rows, int64_t count, Chunk chunk, const double* weights,
                               void* positive, void* negative);
  // Of `tasks` rows `count` are there, the others are zero. `out` may be one of them.
  void (*trimmed_mean[kRowTypes])(const void* const* rows, int64_t count, int64_t tasks, Chunk chunk,
                                  SortingNetwork network, int64_t trim, void* out, void* scratch);
  // Whether any element is other than zero.
  bool (*any_nonzero[kRowTypes])(const void* row, int64_t width);
};

extern const Kernels kernels_baseline;
#ifdef FPG_HAVE_X86_ISAS
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

extern const Kernels* kernels;  // those in use, see library.cpp

}  // namespace fpg
