// What the CUDA library says of itself.
#include "launch.h"

namespace fpg {

__global__ void probe_kernel(int) {}

}  // namespace fpg

int fpg_abi_version(void) { return FPG_ABI_VERSION; }

// A kernel's attributes are known only where the driver works and the library has code for the device.
int fpg_cuda_probe(void) {
  int blocks_of_probe = 0;
  return fpg::status_of(fpg::resident_blocks(&blocks_of_probe, fpg::probe_kernel, fpg::kThreads, 0));
}

const char* fpg_cuda_error(int status) {
  if (status >= fpg::kCudaError) return fpg::error_text(status - fpg::kCudaError);
  switch (status) {
    case FPG_OK: return "no error";
    case FPG_BAD_ARGUMENT: return "bad argument";
    case FPG_OUT_OF_MEMORY: return "out of memory";
    default: return "unknown status";
  }
}
