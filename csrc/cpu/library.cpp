// The CPU library as a whole: its version, and the instruction set that is used.
#include <cstring>

#include "../fastpcgrad.h"
#include "kernels/kernels.h"

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

}  // namespace

const Kernels* kernels = best_kernels();

}  // namespace fpg

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
