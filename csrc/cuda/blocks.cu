// J in blocks: the workspace of a call, and how its tables come to the device.
#include "blocks.h"

namespace fpg {

template <int kWords>
struct TableJob {
  uint64_t* to;
  int64_t count;
  uint64_t words[kWords];
};
template <int kWords>
__global__ void __launch_bounds__(kThreads) table_kernel(const __grid_constant__ TableJob<kWords> job) {
  const int64_t k = block_index() * kThreads + thread_index();
  if (k < job.count) job.to[k] = job.words[k];
}

// The whole of the parameters travels with each launch, so short tables have a kernel of their own.
constexpr int kFewWords = 500;
constexpr int kManyWords = (kMostParameterBytes - 64) / static_cast<int>(sizeof(uint64_t));

template <int kWords>
int upload_some(const Device& device, const uint64_t* from, int64_t count, uint64_t* to, void* stream) {
  TableJob<kWords> job;
  job.to = to;
  job.count = count;
  std::copy_n(from, count, job.words);
  return run<table_kernel<kWords>>(device, divide_up(count, kThreads), 0, false, stream, job);
}

int upload(const Device& device, const std::vector<uint64_t>& words, void* to, void* stream) {
  const int64_t count = static_cast<int64_t>(words.size());
  uint64_t* place = static_cast<uint64_t*>(to);
  if (count <= kFewWords) return upload_some<kFewWords>(device, words.data(), count, place, stream);
  for (int64_t done = 0; done < count; done += kManyWords) {
    const int64_t some = std::min<int64_t>(kManyWords, count - done);
    if (const int error = upload_some<kManyWords>(device, words.data() + done, some, place + done, stream))
      return error;
  }
  return 0;
}

}  // namespace fpg

int64_t fpg_cuda_combine_workspace_blocks(int64_t blocks, int64_t tasks, int64_t count) {
  return fpg::BlockTable::number_of_words(blocks, tasks, count) * static_cast<int64_t>(sizeof(uint64_t));
}

int64_t fpg_cuda_workspace_blocks(const int64_t* widths, int64_t blocks, int64_t tasks, int dtype, int64_t problems) {
  const fpg::GivenBlocks given = {nullptr, widths, blocks, tasks, dtype, nullptr, problems, nullptr};
  if (!given.valid()) return 0;
  const int64_t step = fpg::gram_plan(tasks, 0, 1, fpg::itemsize_of(dtype)).step;
  const int64_t column_step = fpg::columns_step(tasks, fpg::itemsize_of(dtype));
  int64_t steps = 0;
  for (int64_t b = 0; b < blocks; ++b) steps += fpg::divide_up(widths[b], column_step) * (column_step / step);
  // An upper bound, since blocks may be left out.
  const int64_t items = std::min(steps, fpg::most_gram_slots(tasks)) + blocks;
  const int64_t words = fpg::BlockTable::number_of_words(blocks, tasks, problems);
  return words * static_cast<int64_t>(sizeof(uint64_t)) + fpg::gram_workspace(items, tasks, problems);
}
