// The host side: what is known of the device, how a kernel is started, and the passes that several entry points share.
// Nothing is allocated and nothing is waited for: a call can be captured in a CUDA graph.
#pragma once

#include <atomic>

#include "../fastpcgrad.h"
#include "finish.h"
#include "mix_tensor.h"

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

constexpr int kDevices = 64;  // of which something is kept
constexpr int64_t kSharedWithoutAsking = 48 * 1024;

// Lets a kernel have all the shared memory of a block, once per kernel and device. Never less: another thread may be
// about to launch the same kernel with more.
template <auto kKernel>
inline int allow_shared_memory(const Device& device) {
  static std::atomic<bool> known[kDevices];
  std::atomic<bool>& mine = known[device.index % kDevices];
  if (device.index < kDevices && mine.load(std::memory_order_acquire)) return 0;
  const int error = allow_shared_memory(kKernel, device.shared_per_block);
  if (error == 0 && device.index < kDevices) mine.store(true, std::memory_order_release);
  return error;
}

// How many blocks of a kernel the device holds at a time. Asked for once per kernel, device and size.
template <auto kKernel>
inline int blocks_at_a_time(const Device& device, int64_t shared_bytes, int64_t* count) {
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

// At most `block_count` blocks; a cooperative launch has no more than the device holds at a time, and still less where
// the stream has a part of the device's multiprocessors only, as in a green context.
template <auto kKernel, class Job>
inline int run(const Device& device, int64_t block_count, int64_t shared_bytes, bool cooperative, void* stream,
               const Job& job) {
  if (shared_bytes > kSharedWithoutAsking) {
    if (const int error = allow_shared_memory<kKernel>(device)) return error;
  }
  if (cooperative) {
    int64_t most = 0;
    if (const int error = blocks_at_a_time<kKernel>(device, shared_bytes, &most)) return error;
    if (block_count > most) block_count = most;
  }
  if (block_count < 1) block_count = 1;
  if (block_count > INT32_MAX) return too_many_blocks();  // the runtime takes the lower half of such a number
  int error = start(kKernel, block_count, kThreads, shared_bytes, cooperative, stream, job);
  while (are_too_many_blocks(error) && block_count > 1) {
    forget_error();
    block_count = divide_up(block_count, 2);
    error = start(kKernel, block_count, kThreads, shared_bytes, cooperative, stream, job);
  }
  return error;
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
template <bool kValue>
struct Truth {
  static constexpr bool value = kValue;
};
// body(Number<G>(), Truth<kMany>()) for the groups of 8 rows of a tile, 0 for float64 rows, and whether there are many.
template <class Row, class Body>
inline int with_tiles(int64_t tasks, Body body) {
  if constexpr (kIsDouble<Row>) {
    return body(Number<0>(), Truth<true>());
  } else {
    if (tasks <= 16) return body(Number<2>(), Truth<false>());
    if (tasks <= 24) return body(Number<3>(), Truth<false>());
    if (tasks <= 32) return body(Number<4>(), Truth<false>());
    return tasks <= kRowsOfTile ? body(Number<8>(), Truth<false>()) : body(Number<8>(), Truth<true>());
  }
}

constexpr int64_t itemsize_of(int dtype) { return dtype == FPG_F64 ? 8 : dtype == FPG_F32 ? 4 : 2; }

inline Rows packed_rows(const void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                        const int64_t* offsets, int64_t segments, void* out) {
  const uintptr_t data = reinterpret_cast<uintptr_t>(grads), to = reinterpret_cast<uintptr_t>(out);
  const bool aligned = data % 16 == 0 && to % 16 == 0 && (tasks == 1 || row_stride * itemsize_of(dtype) % 16 == 0);
  return {const_cast<void*>(grads), static_cast<int>(tasks), width, row_stride, offsets, segments, aligned, out};
}

// Of a kernel that takes `bytes` of shared memory itself; the addresses of a block's rows go behind them.
inline int64_t shared_memory_of(Rows&, int64_t bytes) { return bytes; }
inline int64_t shared_memory_of(BlockRows& rows, int64_t bytes) {
  rows.shared_at = divide_up(bytes, 16) * 16;
  return rows.shared_at + addresses_of_block(rows.tasks) * static_cast<int64_t>(sizeof(uint64_t));
}

inline Plan gram_plan_of(const Rows& rows, int64_t itemsize) {
  return gram_plan(rows.tasks, rows.width, rows.problems, itemsize);
}
inline Plan gram_plan_of(const BlockRows& rows, int64_t itemsize) {
  return gram_plan(rows.tasks, rows.width, rows.blocks, itemsize);
}
inline Plan columns_plan_of(const Rows& rows, int64_t itemsize) {
  return columns_plan(rows.tasks, rows.width, rows.problems, itemsize);
}
inline Plan columns_plan_of(const BlockRows& rows, int64_t itemsize) {
  return columns_plan(rows.tasks, rows.width, rows.blocks, itemsize);
}

inline bool is_valid(int64_t tasks, int64_t width, int dtype, int64_t segments) {
  return tasks > 0 && tasks <= kLargestTasks && width >= 0 && dtype >= FPG_F32 && dtype <= FPG_F64 && segments > 0;
}

// Where a job's order lies; false where it cannot be. A number that is no task's stays none.
inline bool take_order(OrderedJob& job, int64_t order_kind) {
  job.order_per_problem = order_kind == FPG_ORDER_PER_SEGMENT;
  job.given = order_kind == FPG_ORDER_ON_HOST;
  if (!job.given) return true;
  if (job.tasks > kMostTasksGiven) return false;
  for (int64_t k = 0; k < job.tasks * job.tasks; ++k) {
    const int64_t j = job.order[k];
    job.places[k] = static_cast<uint8_t>(j < 0 || j >= job.tasks ? kMostTasksGiven : j);
  }
  return true;
}

// Each of the passes, for Rows and for BlockRows; a cudaError_t. Kernels of an op lie in the file of its name.
template <class J>
int start_gram(const Device& device, GramJob<J> job, int dtype, void* stream);
template <class J>
int start_finish(const Device& device, GramJob<J> job, const OrderedJob& solve, int dtype, void* stream);
template <class J>
int start_combine(const Device& device, CombineJob<J> job, int dtype, void* stream);
int start_mix(const Device& device, const MixJob& job, int dtype, void* stream);

// `workspace`: partial Gram matrices, then the flags.
template <class J>
GramJob<J> gram_job(const J& rows, int dtype, double* gram, void* workspace) {
  const Plan plan = gram_plan_of(rows, itemsize_of(dtype));
  double* partials = static_cast<double*>(workspace);
  int* flags = reinterpret_cast<int*>(partials + plan.items * pair_index(rows.tasks, 0));
  // The squares of fp16 never leave fp32's range, and float64 rows have no wider one to go to.
  return {rows, plan, partials, flags, gram, dtype == FPG_F32 || dtype == FPG_BF16};
}
inline int64_t gram_workspace(int64_t items, int64_t tasks, int64_t problems) {
  return items * pair_index(tasks, 0) * static_cast<int64_t>(sizeof(double)) +
         problems * tasks * static_cast<int64_t>(sizeof(int));
}

}  // namespace fpg
