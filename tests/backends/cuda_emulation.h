// A GPU's threads on one CPU core, for csrc/cuda/platform.h: the kernels run as they are, their arithmetic is checked.
//
// Each thread is a fiber; barriers and warp operations switch between the fibers of a block, or of all blocks of a
// cooperative launch. Blocks of other launches run last first. Shared memory starts as NaN and ends in a guard.
// Tensor cores are modelled pessimistically: each sum is rounded toward zero.
#pragma once

#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define FPG_RARE

namespace fpg {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 * 1024;
constexpr int kGuardBytes = 64;

struct Warp {
  int arrived = 0;
  int64_t generation = 0;
  uint32_t given[kWarpSize][10];
  uint32_t taken[kWarpSize][4];
};

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};

struct Block {
  int64_t index;
  Barrier barriers[16];
  int arrived = 0;
  int64_t generation = 0;
  bool any = false, result = false;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  std::vector<std::vector<Copy>> copies;  // groups under way, the oldest first
  Block* block = nullptr;
  int thread = 0;
  bool started = false, done = false;
  jmp_buf resume;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
};

struct Grid {
  int64_t block_count = 0;
  int64_t arrived = 0, threads = 0, generation = 0;
};

inline Fiber* self;
inline Grid grid;
inline jmp_buf scheduler;
inline std::function<void()> entry;
inline std::vector<std::unique_ptr<Fiber>> pool;
inline int multiprocessors = 2;
inline int part_of_device = 0;  // the multiprocessors of a green context; 0 for all of them
inline int device = 0;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s\n", what);
  std::abort();
}

inline void run_fiber() {
  self->copies.assign(1, {});
  entry();
  for (const auto& group : self->copies) {
    if (!group.empty()) fail("copies that nobody waited for");
  }
  self->done = true;
  longjmp(scheduler, 1);
}

inline void switch_away() {
  if (setjmp(self->resume) == 0) longjmp(scheduler, 1);
}

template <class Done>
inline void wait_until(Done done) {
  for (int64_t turns = 0; !done(); ++turns) {
    if (turns > 1000000) fail("a barrier that not all threads reach");
    switch_away();
  }
}

// Runs `blocks` to the end, a turn for each fiber that is left.
inline void run_blocks(std::vector<std::unique_ptr<Block>>& run, int threads) {
  const size_t count = run.size() * static_cast<size_t>(threads);
  while (pool.size() < count) {
    pool.push_back(std::make_unique<Fiber>());
    pool.back()->stack.reset(new char[kStackBytes]);
  }
  for (size_t k = 0; k < count; ++k) {
    Fiber& fiber = *pool[k];
    fiber.block = run[k / static_cast<size_t>(threads)].get();
    fiber.thread = static_cast<int>(k % static_cast<size_t>(threads));
    fiber.started = fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (volatile size_t left = count; left > 0;) {
    for (volatile size_t k = 0; k < count; ++k) {
      if (pool[k]->done) continue;
      self = pool[k].get();
      if (setjmp(scheduler) == 0) {
        if (self->started) longjmp(self->resume, 1);
        self->started = true;
        setcontext(&self->context);
      }
      if (pool[k]->done) left = left - 1;
    }
  }
}

inline unsigned char* shared_memory() { return self->block->shared.data(); }
inline int thread_index() { return self->thread; }
inline int64_t block_index() { return self->block->index; }
inline int64_t blocks() { return grid.block_count; }

inline bool any_in_block(bool value) {
  Block& block = *self->block;
  const int64_t generation = block.generation;
  block.any = block.any || value;
  if (++block.arrived == static_cast<int>(block.warps.size()) * kWarpSize) {
    block.result = block.any;
    block.any = false;
    block.arrived = 0;
    ++block.generation;
  } else {
    wait_until([&] { return block.generation != generation; });
  }
  return block.result;
}
inline void sync_block() { any_in_block(false); }

inline void sync_threads(int barrier, int threads) {
  if (barrier < 1 || barrier > 15 || threads % kWarpSize != 0) fail("a barrier that there is not");
  Barrier& mine = self->block->barriers[barrier];
  const int64_t generation = mine.generation;
  if (++mine.arrived == threads) {
    mine.arrived = 0;
    ++mine.generation;
  } else {
    wait_until([&] { return mine.generation != generation; });
  }
}

inline void sync_grid() {
  const int64_t generation = grid.generation;
  if (++grid.arrived == grid.threads) {
    grid.arrived = 0;
    ++grid.generation;
  } else {
    wait_until([&] { return grid.generation != generation; });
  }
}

// Each lane gives words; the last to arrive computes what every lane takes.
template <class Compute>
inline const uint32_t* in_warp(const uint32_t* words, int count, Compute compute) {
  Warp& warp = self->block->warps[static_cast<size_t>(self->thread / kWarpSize)];
  const int lane = self->thread % kWarpSize;
  const int64_t generation = warp.generation;
  if (count > 0) std::memcpy(warp.given[lane], words, static_cast<size_t>(count) * sizeof(uint32_t));
  if (++warp.arrived == kWarpSize) {
    compute(warp);
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait_until([&] { return warp.generation != generation; });
  }
  return warp.taken[lane];
}

inline void sync_warp() {
  in_warp(nullptr, 0, [](Warp&) {});
}

inline double shuffle_xor(double value, int mask) {
  uint32_t words[2];
  std::memcpy(words, &value, sizeof(value));
  const uint32_t* taken = in_warp(words, 2, [mask](Warp& warp) {
    for (int lane = 0; lane < kWarpSize; ++lane) std::memcpy(warp.taken[lane], warp.given[lane ^ mask], 8);
  });
  std::memcpy(&value, taken, sizeof(value));
  return value;
}

inline void* global_memory(uint64_t address) { return reinterpret_cast<void*>(address); }

struct alignas(16) Packed {
  uint32_t word[4];
};
inline Packed load_packed(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("a 16-byte load that is not aligned");
  Packed value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
inline void store_packed(void* to, Packed value) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) fail("a 16-byte store that is not aligned");
  std::memcpy(to, &value, sizeof(value));
}

// As late as is allowed.
template <int kBytes>
inline void copy_ahead(void* to, const void* from, bool there) {
  const uintptr_t source = there ? reinterpret_cast<uintptr_t>(from) : 0;
  if ((source | reinterpret_cast<uintptr_t>(to)) % kBytes != 0) fail("an unaligned copy");
  self->copies.back().push_back({to, there ? from : nullptr, kBytes});
}
inline void commit_copies() { self->copies.emplace_back(); }
template <int kLeft>
inline void wait_for_copies() {
  auto& groups = self->copies;
  while (groups.size() > kLeft + 1) {
    for (const Copy& copy : groups.front()) {
      if (copy.from == nullptr) std::memset(copy.to, 0, copy.bytes);
      if (copy.from != nullptr) std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float bits_to_float(uint32_t bits) { return bits_as<float>(bits); }
inline uint32_t float_to_bits(float value) { return bits_as<uint32_t>(value); }
inline double bits_to_double(uint64_t bits) { return bits_as<double>(bits); }
inline uint64_t double_to_bits(double value) { return bits_as<uint64_t>(value); }
inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}
inline uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude != magnitude) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude == 0) return sign;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int last = exponent - 11 < -24 ? -24 : exponent - 11;  // the power of two of the last place
  const int places = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -last)));
  return sign | static_cast<uint16_t>((last + 24) * 1024 + places);
}
inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = float_to_bits(value);
  return static_cast<uint16_t>(value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline double fused(double a, double b, double c) { return std::fma(a, b, c); }

inline float rounded_toward_zero(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(value) && std::isfinite(value)
             ? std::nextafterf(nearest, 0)
             : nearest;
}

// The number of k at `place` of a lane's words: 1 (tf32) or 2 (16 bits) a word.
template <Product kProduct>
inline double operand(const uint32_t* words, int word, int part) {
  if constexpr (kProduct == Product::kTf32) return bits_to_float(words[word] & ~0x1fffu);
  const uint16_t bits = static_cast<uint16_t>(words[word] >> (16 * part));
  return kProduct == Product::kHalf ? half_to_float(bits) : bits_to_float(static_cast<uint32_t>(bits) << 16);
}

template <Product kProduct>
inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr int kParts = kProduct == Product::kTf32 ? 1 : 2;
  uint32_t words[10];
  std::memcpy(words, a, sizeof(a));
  std::memcpy(words + 4, b, sizeof(b));
  std::memcpy(words + 6, sums, sizeof(sums));
  const uint32_t* taken = in_warp(words, 10, [](Warp& warp) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int k = 0; k < 4; ++k) {
        const int row = lane / 4 + k / 2 * 8, column = lane % 4 * 2 + k % 2;
        double sum = bits_to_float(warp.given[lane][6 + k]);
        for (int q = 0; q < 4; ++q) {
          const uint32_t* left = warp.given[row % 8 * 4 + q];
          const uint32_t* right = warp.given[column * 4 + q] + 4;
          for (int half = 0; half < 2; ++half) {
            for (int part = 0; part < kParts; ++part) {
              sum += operand<kProduct>(left, 2 * half + row / 8, part) * operand<kProduct>(right, half, part);
            }
          }
        }
        warp.taken[lane][k] = float_to_bits(rounded_toward_zero(sum));
      }
    }
  });
  std::memcpy(sums, taken, sizeof(sums));
}

constexpr int kMostParameterBytes = 8192;
inline int shared_of_block = 227 * 1024;  // a kilobyte less than a multiprocessor has
enum EmulatedError {
  kNoError = 0,
  kInvalidValue = 1,
  kInvalidConfiguration = 9,
  kInvalidHandle = 400,
  kTooManyBlocks = 720
};

inline int find_device(int* index) {
  *index = device;
  return kNoError;
}
inline int device_attribute(int* value, DeviceAttribute attribute, int) {
  const int values[] = {multiprocessors, shared_of_block + 1024, shared_of_block, 9, 0};
  *value = values[static_cast<int>(attribute)];
  return kNoError;
}
// Bytes of shared memory that a kernel may have on a device; the runtime's own until somebody asks for more. Who asks
// for less than another has asked for takes it from a launch that is on its way.
inline std::map<std::pair<void (*)(), int>, int64_t> allowed;
template <class Job>
inline int64_t& allowed_of(void (*kernel)(Job)) {
  return allowed.emplace(std::pair(reinterpret_cast<void (*)()>(kernel), device), 48 * 1024).first->second;
}
template <class Job>
inline int allow_shared_memory(void (*kernel)(Job), int64_t bytes) {
  if (bytes > shared_of_block || bytes < allowed_of(kernel)) return kInvalidValue;
  allowed_of(kernel) = bytes;
  return kNoError;
}
template <class Job>
inline int resident_blocks(int* count, void (*)(Job), int, int64_t shared_bytes) {
  if (shared_bytes > shared_of_block) return kInvalidValue;
  *count = (shared_of_block + 1024) / static_cast<int>(shared_bytes + 1024) < 2 ? 1 : 2;
  return kNoError;
}
template <class Job>
inline int start(void (*kernel)(Job), int64_t block_count, int threads, int64_t shared_bytes, bool cooperative,
                 void* stream, Job job) {
  if (stream == reinterpret_cast<void*>(~uintptr_t{0})) return kInvalidHandle;
  int resident = 0;
  if (resident_blocks(&resident, kernel, threads, shared_bytes) != kNoError) return kInvalidValue;
  if (shared_bytes > allowed_of(kernel)) return kInvalidValue;
  const int at_hand = part_of_device > 0 ? part_of_device : multiprocessors;
  if (cooperative && block_count > int64_t{resident} * at_hand) return kTooManyBlocks;
  entry = [&] { kernel(job); };
  grid = {block_count, 0, block_count * threads, 0};
  const int64_t together = cooperative ? block_count : 1;
  for (int64_t done = 0; done < block_count; done += together) {
    std::vector<std::unique_ptr<Block>> run;
    for (int64_t k = 0; k < together; ++k) {
      auto block = std::make_unique<Block>();
      block->index = block_count - 1 - done - k;
      block->warps.resize(static_cast<size_t>(threads / kWarpSize));
      block->shared.assign(static_cast<size_t>(shared_bytes + kGuardBytes), 0xff);
      run.push_back(std::move(block));
    }
    run_blocks(run, threads);
    for (const auto& block : run) {
      for (int k = 0; k < kGuardBytes; ++k) {
        if (block->shared[static_cast<size_t>(shared_bytes + k)] != 0xff) fail("a write behind the shared memory");
      }
    }
  }
  return kNoError;
}
inline int too_many_blocks() { return kInvalidConfiguration; }
inline bool are_too_many_blocks(int error) { return error == kTooManyBlocks; }
inline const char* error_text(int error) {
  return error == kInvalidHandle          ? "invalid resource handle"
         : error == kTooManyBlocks        ? "too many blocks in cooperative launch"
         : error == kInvalidConfiguration ? "invalid configuration argument"
                                          : "invalid argument";
}
inline void forget_error() {}

}  // namespace fpg
