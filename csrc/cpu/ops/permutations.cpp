// permutations: the shuffles of torch.randperm on random bits that were drawn at once.
#include <cstdint>

#include "../../fastpcgrad.h"

int fpg_cpu_permutations(const uint64_t* bits, int64_t count, int64_t size, int64_t* permutations, int) {
  if (count < 0 || size <= 0) return FPG_BAD_ARGUMENT;
  int64_t drawn = 0;
  for (int64_t r = 0; r < count; ++r) {
    int64_t* row = permutations + r * size;
    for (int64_t i = 0; i < size; ++i) row[i] = i;
    for (int64_t i = 0; i + 1 < size; ++i, ++drawn) {
      const uint64_t number = drawn % 2 == 0 ? bits[drawn / 2] >> 32 : bits[drawn / 2] & UINT32_MAX;
      const int64_t other = i + static_cast<int64_t>(number % static_cast<uint64_t>(size - i));
      const int64_t held = row[i];
      row[i] = row[other];
      row[other] = held;
    }
  }
  return FPG_OK;
}
