// Functions that the CPU library and the kernels of the CUDA library share.
#pragma once

#if defined(__CUDACC__)
#define FPG_HOST_DEVICE __host__ __device__ inline
#else
#define FPG_HOST_DEVICE inline
#endif
