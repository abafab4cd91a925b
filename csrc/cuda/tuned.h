// What is chosen by measuring, as data: benchmarks/tune.py tries other values and writes these lines anew.
//
// A value may be overridden on the compiler's command line, which is how the script tries one. Shapes that decide the
// order of a sum are the same for all GPUs, so that all give the same bits; what may differ is a table by architecture.
#pragma once

#include <cstdint>

namespace fpg {

// Vectors of 16 bytes that a thread has in flight of each row, where at most 2, 4 or 8 rows are held in registers.
#ifndef FPG_VECTORS_OF_2
#define FPG_VECTORS_OF_2 4
#endif
#ifndef FPG_VECTORS_OF_4
#define FPG_VECTORS_OF_4 2
#endif
#ifndef FPG_VECTORS_OF_8
#define FPG_VECTORS_OF_8 1
#endif

// Partial Gram matrices: as many as there are steps up to the first; then a step in eight, up to the last.
#ifndef FPG_FEW_SLOTS
#define FPG_FEW_SLOTS 256
#endif
#ifndef FPG_MANY_SLOTS
#define FPG_MANY_SLOTS 2048
#endif

// Up to this size of J in bytes the whole surgery is one launch: of rows that a thread holds (T <= 8), and of more. The
// first line whose architecture is at most the device's counts. Measured: 90.
struct Crossover {
  int architecture;
  int64_t held_bytes;
  int64_t tiles_bytes;
};
constexpr Crossover kCrossovers[] = {
    {100, int64_t{128} << 20, int64_t{512} << 20},
    {90, int64_t{128} << 20, int64_t{512} << 20},
    {0, int64_t{64} << 20, int64_t{64} << 20},
};

}  // namespace fpg
