// The kernels of one instruction set. Compiled once for each, with -DFPG_ISA=baseline, avx2 or avx512.
#include "kernels.h"

#include "combine.h"
#include "gram.h"
#include "mix.h"
#include "sign_sums.h"
#include "trimmed_mean.h"

#define FPG_JOIN(a, b) a##b
#define FPG_TABLE(isa) FPG_JOIN(kernels_, isa)
#define FPG_QUOTE(text) #text
#define FPG_NAME(isa) FPG_QUOTE(isa)

namespace fpg {

// In the order of fpg_dtype. The second of each pair accumulates in float64.
extern const Kernels FPG_TABLE(FPG_ISA) = {
    FPG_NAME(FPG_ISA),
    FPG_ISA::gram_scratch,
    FPG_ISA::mix_scratch,
    FPG_ISA::trimmed_mean_scratch,
    {{FPG_ISA::gram<float, float>, FPG_ISA::gram<float, double>},
     {FPG_ISA::gram<FPG_ISA::Half, float>, FPG_ISA::gram<FPG_ISA::Half, double>},
     {FPG_ISA::gram<FPG_ISA::BFloat, float>, FPG_ISA::gram<FPG_ISA::BFloat, double>},
     {FPG_ISA::gram<double, double>, FPG_ISA::gram<double, double>}},
    {{FPG_ISA::combine<float, float>, FPG_ISA::combine<float, double>},
     {FPG_ISA::combine<FPG_ISA::Half, float>, FPG_ISA::combine<FPG_ISA::Half, double>},
     {FPG_ISA::combine<FPG_ISA::BFloat, float>, FPG_ISA::combine<FPG_ISA::BFloat, double>},
     {FPG_ISA::combine<double, double>, FPG_ISA::combine<double, double>}},
    {{FPG_ISA::mix<float, float>, FPG_ISA::mix<float, double>},
     {FPG_ISA::mix<FPG_ISA::Half, float>, FPG_ISA::mix<FPG_ISA::Half, double>},
     {FPG_ISA::mix<FPG_ISA::BFloat, float>, FPG_ISA::mix<FPG_ISA::BFloat, double>},
     {FPG_ISA::mix<double, double>, FPG_ISA::mix<double, double>}},
    {FPG_ISA::sign_sums<float, float>, FPG_ISA::sign_sums<FPG_ISA::Half, float>,
     FPG_ISA::sign_sums<FPG_ISA::BFloat, float>, FPG_ISA::sign_sums<double, double>},
    {FPG_ISA::trimmed_mean<float, float>, FPG_ISA::trimmed_mean<FPG_ISA::Half, float>,
     FPG_ISA::trimmed_mean<FPG_ISA::BFloat, float>, FPG_ISA::trimmed_mean<double, double>},
    {FPG_ISA::any_nonzero<float>, FPG_ISA::any_nonzero<FPG_ISA::Half>, FPG_ISA::any_nonzero<FPG_ISA::BFloat>,
     FPG_ISA::any_nonzero<double>},
};

}  // namespace fpg
