// Threads over the parts of a problem, each with memory of its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include <omp.h>

namespace fpg {

struct FreeAligned {
  void operator()(void* memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<void, FreeAligned>;

inline Scratch scratch(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
  return Scratch(memory);
}

// So many threads with 64-byte-aligned memory each, which is taken before any parallel region: no exception may leave
// one.
class Threads {
 public:
  Threads(int count, int64_t bytes_of_each)
      : count_(count), stride_(stride(bytes_of_each)), memory_(scratch(bytes(count, bytes_of_each))) {}

  int count() const { return count_; }
  void* memory_of(int thread) const { return static_cast<char*>(memory_.get()) + stride_ * thread; }

  static int64_t bytes(int count, int64_t bytes_of_each) { return stride(bytes_of_each) * count + 64; }

 private:
  static int64_t stride(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  int count_;
  int64_t stride_;
  Scratch memory_;
};

// How many of `threads` to use for `parts` of work: one where there is less of it than `least_work`, for a second costs
// more than it gives.
inline int threads_for(int64_t work, int64_t least_work, int64_t parts, int threads) {
  if (work < least_work) return 1;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(parts, threads)));
}

// Runs body(k, memory of this thread) for k = 0..count-1, backwards if asked.
template <class Body>
void for_each_part(int64_t count, const Threads& threads, bool backwards, Body body) {
  if (threads.count() <= 1) {
    for (int64_t k = 0; k < count; ++k) body(backwards ? count - 1 - k : k, threads.memory_of(0));
    return;
  }
#pragma omp parallel num_threads(threads.count())
  {
    void* own = threads.memory_of(omp_get_thread_num());
#pragma omp for schedule(dynamic, 1)
    for (int64_t k = 0; k < count; ++k) body(backwards ? count - 1 - k : k, own);
  }
}

}  // namespace fpg
