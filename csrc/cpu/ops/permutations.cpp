// permutations: the shuffles of torch.randperm on random bits that were drawn at once.
#include <cstdint>
#include <vector>

#include "ops.h"

namespace fpg {
namespace {

// number % divisor of 32 bits, by products with 2^64 / divisor (Lemire, Kaser and Kurz 2019, arXiv:1902.01961): a
// division takes several times as long.
class Remainder {
 public:
  explicit Remainder(uint64_t divisor) : divisor_(divisor), inverse_(UINT64_MAX / divisor + 1) {}

  int64_t operator()(uint64_t number) const {
    return static_cast<int64_t>(static_cast<unsigned __int128>(inverse_ * number) * divisor_ >> 64);
  }

 private:
  uint64_t divisor_, inverse_;
};

}  // namespace
}  // namespace fpg

int fpg_cpu_permutations(const uint64_t* bits, int64_t count, int64_t size, int64_t* permutations, int) {
  if (count < 0 || size <= 0 || size > UINT32_MAX) return FPG_BAD_ARGUMENT;
  return fpg::guarded([&] {
    std::vector<fpg::Remainder> left;
    left.reserve(size);
    for (int64_t i = 0; i < size; ++i) left.emplace_back(size - i);
    int64_t drawn = 0;
    for (int64_t r = 0; r < count; ++r) {
      int64_t* row = permutations + r * size;
      for (int64_t i = 0; i < size; ++i) row[i] = i;
      for (int64_t i = 0; i + 1 < size; ++i, ++drawn) {
        const uint64_t number = drawn % 2 == 0 ? bits[drawn / 2] >> 32 : bits[drawn / 2] & UINT32_MAX;
        const int64_t other = i + left[i](number);
        const int64_t held = row[i];
        row[i] = row[other];
        row[other] = held;
      }
    }
    return FPG_OK;
  });
}
