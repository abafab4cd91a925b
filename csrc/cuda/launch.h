// The host side: what is known of the device, how a kernel is started, and the passes that several entry points share.
// Nothing is allocated and nothing is waited for: a call can be captured in a CUDA graph.
#pragma once

#include <atomic>

#include "../fastpcgrad.h"
#include "finish.h"
#include "mix.h"

namespace fpg {

struct Device {
  int index;
  int multiprocessors;
  int64_t shared_per_multiprocessor;
  int64_t shared_per_block;
  int architecture;  // 90 for compute capability 9.0
};

constexpr int kCudaError = 1000;  // added to a cudaError_t it is a status
inline int status_of(int error) {
  if (error == 0) return FPG_OK;
  forget_error();
  return kCudaError + error;
}

inline int find_device(Device* device) {
  int values[5], error = find_device(&device->index);
  for (int k = 0; k < 5 && error == 0; ++k) {
    error = device_attribute(&values[k], static_cast<DeviceAttribute>(k), device->index);
  }
  if (error == 0) *device = {device->index, values[0], values[1], values[2], 10 * values[3] + values[4]};
  return error;
}

// How many blocks of a kernel the device holds at a time. Asked for once per kernel, device and size.
template <auto kKernel>
inline int blocks_at_a_time(const Device& device, int64_t shared_bytes, int64_t* count) {
  constexpr int kDevices = 64;
  static std::atomic<int64_t> known[kDevices];  // shared bytes + 1, then 8 bits of blocks
  std::atomic<int64_t>& mine = known[device.index % kDevices];
  int64_t value = device.index < kDevices ? mine.load(std::memory_order_relaxed) : 0;
  if (value >> 8 != shared_bytes + 1) {
    int each = 0;
    if (const int error = resident_blocks(&each, kKernel, kThreads, shared_bytes)) return error;
    value = (shared_bytes + 1) << 8 | each;
    if (device.index < kDevices) mine.store(value, std::memory_order_relaxed);
  }
  *count = (value & 255) * device.multiprocessors;
  return 0;
}

// At most `block_count` blocks; a cooperative launch has no more than the device holds at a time.
template <auto kKernel, class Job>
inline int run(const Device& device, int64_t block_count, int64_t shared_bytes, bool cooperative, void* stream,
               const Job& job) {
  if (cooperative || shared_bytes > 48 * 1024) {
    int64_t most = 0;
    if (const int error = blocks_at_a_time<kKernel>(device, shared_bytes, &most)) return error;
    if (cooperative && block_count > most) block_count = most;
  }
  return start(kKernel, block_count < 1 ? 1 : block_count, kThreads, shared_bytes, cooperative, stream, job);
}

template <class Row>
struct Type {
  using type = Row;
};
// body(Type<Row>()) for the row type of a fpg_dtype.
template <class Body>
inline int with_row_type(int dtype, Body body) {
  switch (dtype) {
    case FPG_F32: return body(Type<float>());
    case FPG_F16: return body(Type<Half>());
    case FPG_BF16: return body(Type<BFloat>());
    default: return body(Type<double>());
  }
}
template <int kValue>
struct Number {
  static constexpr int value = kValue;
};
// body(Number<R>()) for the rows that a thread holds.
template <class Body>
inline int with_rows_held(int64_t tasks, Body body) {
  switch (rows_held_for(tasks)) {
    case 2: return body(Number<2>());
    case 4: return body(Number<4>());
    default: return body(Number<8>());
  }
}
// body(Number<G>()) for the groups of 8 rows of a tile; 0 for float64 rows.
template <class Row, class Body>
inline int with_groups(int64_t tasks, Body body) {
  if constexpr (kIsDouble<Row>) {
    return body(Number<0>());
  } else {
    return tasks <= 16 ? body(Number<2>()) : body(Number<4>());
  }
}

constexpr int64_t itemsize_of(int dtype) { return dtype == FPG_F64 ? 8 : dtype == FPG_F32 ? 4 : 2; }

inline bool is_aligned(const Rows& rows, int64_t itemsize, const void* out) {
  const uintptr_t data = reinterpret_cast<uintptr_t>(rows.data), to = reinterpret_cast<uintptr_t>(out);
  return data % 16 == 0 && to % 16 == 0 && (rows.tasks == 1 || rows.stride * itemsize % 16 == 0);
}

inline bool is_valid(int64_t tasks, int64_t width, int dtype, int64_t segments) {
  return tasks > 0 && tasks <= kLargestTasks && width >= 0 && dtype >= FPG_F32 && dtype <= FPG_F64 && segments > 0;
}

// Each of the passes; a cudaError_t. Kernels of an op lie in the file of its name.
int start_gram(const Device& device, const GramJob& job, int dtype, void* stream);
int start_finish(const Device& device, const GramJob& job, const SolveJob& solve, int dtype, void* stream);
int start_combine(const Device& device, const CombineJob& job, int dtype, void* stream);
int start_mix(const Device& device, const MixJob& job, int dtype, void* stream);

GramJob gram_job(const Rows& rows, int dtype, double* gram, void* workspace);

}  // namespace fpg
