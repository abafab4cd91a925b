// The few things that differ between a GPU and the tests' emulation of one, which runs these sources on a CPU.
//
// Kernels take all shared memory dynamically, and touch threads, warps and the grid through these names alone.
#pragma once

#include <cstdint>

namespace fpg {
enum class DeviceAttribute { kMultiprocessors, kSharedPerMultiprocessor, kSharedPerBlock, kMajor, kMinor };
enum class Product { kTf32, kHalf, kBFloat };
}  // namespace fpg

#if defined(FPG_EMULATION)
#include FPG_EMULATION
#else

#include <cuda_runtime.h>

namespace fpg {

// A function of its own, so that rare work does not set the registers of a whole kernel.
#define FPG_RARE __noinline__

extern __shared__ __align__(16) unsigned char fpg_shared_memory[];
__device__ inline unsigned char* shared_memory() { return fpg_shared_memory; }
__device__ inline int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ inline int64_t block_index() { return blockIdx.x; }
__device__ inline int64_t blocks() { return gridDim.x; }
__device__ inline void sync_block() { __syncthreads(); }
__device__ inline bool any_in_block(bool value) { return __syncthreads_or(value) != 0; }
__device__ inline void sync_warp() { __syncwarp(); }
// Joins `threads` threads, whole warps, that name the same one of 16 barriers; 0 is the block's.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}
__device__ inline double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// The pointer of an address in the device's memory: a compiler that knows this loads without asking where.
__device__ inline void* global_memory(uint64_t address) {
  void* pointer = reinterpret_cast<void*>(address);
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

struct alignas(16) Packed {
  uint32_t word[4];
};

__device__ inline Packed load_packed(const void* from) {
  const uint4 value = *static_cast<const uint4*>(from);
  return {{value.x, value.y, value.z, value.w}};
}
__device__ inline void store_packed(void* to, Packed value) {
  *static_cast<uint4*>(to) = make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
}

// 16, 8 or 4 bytes from the device's memory to shared memory, without a register in between; zeros where not `there`,
// and then nothing is read. Copies of a thread since its last commit are a group; wait_for_copies<n> leaves the n
// youngest groups under way, and the thread may read what the others brought.
template <int kBytes>
__device__ inline void copy_ahead(void* to, const void* from, bool there) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const size_t global = __cvta_generic_to_global(from);
  const int bytes = there ? kBytes : 0;
  if constexpr (kBytes == 16) {  // not through the L1 cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(shared), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(shared), "l"(global), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kLeft) : "memory");
}

__device__ inline float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t float_to_bits(float value) { return __float_as_uint(value); }
__device__ inline double bits_to_double(uint64_t bits) { return __longlong_as_double(static_cast<long long>(bits)); }
__device__ inline uint64_t double_to_bits(double value) { return static_cast<uint64_t>(__double_as_longlong(value)); }
__device__ inline float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ inline uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ inline uint16_t float_to_bfloat(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return fma(a, b, c); }

// sums [16, 8] += a [16, k] b [8, k]^T. Lane 4 g + q holds of a: row g in words 0 and 2, row g + 8 in words 1 and 3;
// of b: row g; of sums: columns 2 q and 2 q + 1 of row g, then of row g + 8. Each word is one tf32 or two 16-bit
// numbers of k, which both operands place alike. Of a word for a tf32 the last 13 bits are not looked at.
template <Product kProduct>
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kProduct == Product::kTf32) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (kProduct == Product::kHalf) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Bytes of a kernel's parameters.
#if CUDART_VERSION >= 12010
constexpr int kMostParameterBytes = 32764;
#else
constexpr int kMostParameterBytes = 4096;
#endif

// What the host side asks of the runtime. Each returns a cudaError_t.
inline int find_device(int* index) { return cudaGetDevice(index); }
inline int device_attribute(int* value, DeviceAttribute attribute, int device) {
  constexpr cudaDeviceAttr kAttributes[] = {cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                            cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrComputeCapabilityMajor,
                                            cudaDevAttrComputeCapabilityMinor};
  return cudaDeviceGetAttribute(value, kAttributes[static_cast<int>(attribute)], device);
}
template <class Job>
inline int allow_shared_memory(void (*kernel)(Job), int64_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}
template <class Job>
inline int resident_blocks(int* count, void (*kernel)(Job), int threads, int64_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(count, kernel, threads, static_cast<size_t>(shared_bytes));
}
template <class Job>
inline int start(void (*kernel)(Job), int64_t block_count, int threads, int64_t shared_bytes, bool cooperative,
                 void* stream, Job job) {
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(block_count));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &together;
  config.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, job);
}
inline int too_many_blocks() { return cudaErrorInvalidConfiguration; }
inline bool are_too_many_blocks(int error) { return error == cudaErrorCooperativeLaunchTooLarge; }
inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
// The first error stays until it is asked for: a launch's must not be found by somebody else.
inline void forget_error() { static_cast<void>(cudaGetLastError()); }

}  // namespace fpg
#endif
