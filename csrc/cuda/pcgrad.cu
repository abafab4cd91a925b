// pcgrad: the whole surgery. Small and middle J: one cooperative launch, in which each block keeps what it can of its
// columns in shared memory from the first pass to the second. Large J, and J in blocks: a launch for each pass and one
// between them.
#include "blocks.h"
#include "launch.h"

namespace fpg {

struct PcgradJob {
  GramJob<Rows> gram;
  SolveJob solve;
  Plan plan;      // of the second pass
  bool in_place;  // J <- C J; no weights and no out
  int64_t kept;   // steps that a block keeps
};

// Shared memory of the kernel below, before the vectors it keeps: the tile of gram or the dots of the solve, C, w.
constexpr int kHeldSquare = kMostRowsHeld * kMostRowsHeld;
constexpr int kBeforeCoefficients = column_tile_bytes(kMostRowsHeld, 0);
constexpr int kBeforeKept = kBeforeCoefficients + (kHeldSquare + kMostRowsHeld) * static_cast<int>(sizeof(double));
static_assert(kBeforeCoefficients >= solve_bytes(kMostRowsHeld) && kBeforeKept % 16 == 0, "the parts do not overlap");

// One problem's C and weights by each block for itself, which costs less than to wait for another's.
__device__ inline void solve_alone(const SolveJob& job, double* coefficients, double* weights) {
  const int64_t tasks = job.tasks;
  double* dots = reinterpret_cast<double*>(shared_memory()) + thread_index() / 32 * tasks;
  for (int64_t i = thread_index() / 32; i < tasks; i += kWarps) solve_row(job, 0, i, coefficients + i * tasks, dots);
  sync_block();
  for (int64_t k = thread_index(); k < tasks; k += kThreads) {
    weights[k] = merged_weight(coefficients, tasks, k, job.scale);
  }
  sync_block();
  if (block_index() != 0) return;
  for (int64_t k = thread_index(); k < tasks * tasks; k += kThreads) job.coefficients[k] = coefficients[k];
  if (job.weights == nullptr) return;
  for (int64_t k = thread_index(); k < tasks; k += kThreads) job.weights[k] = weights[k];
}

__device__ inline bool any_unsafe(const double* weights, int64_t count) {
  bool unsafe = false;
  for (int64_t k = thread_index(); k < count; k += kThreads) unsafe = unsafe || unsafe_weight(weights[k]);
  return any_in_block(unsafe);
}

// The sum of the partial Gram matrices; one function for all kernels of a row type.
template <class Row>
__device__ FPG_RARE void finish_gram_together(const GramJob<Rows>& job) {
  finish_gram<Row>(job);
}

__device__ inline double* own_coefficients() {
  return reinterpret_cast<double*>(shared_memory() + kBeforeCoefficients);
}
__device__ inline double* own_weights() { return own_coefficients() + kHeldSquare; }
__device__ inline Kept kept_by(const PcgradJob& job) {
  return {reinterpret_cast<Packed*>(shared_memory() + kBeforeKept), job.kept};
}
__device__ inline int64_t steps_of_slot(const Plan& plan) { return plan.span / plan.step; }

// The two second passes over the items of this block, last ones first. `alone`: with the weights or coefficients that
// solve_alone left.
template <class Row, int R>
__device__ inline void combine_mine(const PcgradJob& job, int64_t mine, bool alone) {
  const Rows& rows = job.gram.rows;
  const Plan& plan = job.gram.plan;
  const int64_t tasks = rows.tasks;
  double* weights = own_weights();
  bool wide = alone && any_unsafe(weights, tasks);
  while (mine-- > 0) {
    const Item item = rows.item(plan, block_index() + mine * blocks());
    if (!alone) wide = take_weights(job.solve.weights + item.segment * tasks, tasks, weights);
    combine_item<Row, vectors_of(R), R>(rows, plan, item, weights, wide, kept_by(job), mine * steps_of_slot(plan));
  }
}

template <class Row, int R>
__device__ inline void mix_mine(const PcgradJob& job, int64_t mine, bool alone) {
  const MixJob mix = {job.gram.rows, job.gram.plan, job.solve.coefficients};
  const int64_t square = static_cast<int64_t>(mix.rows.tasks) * mix.rows.tasks;
  double* coefficients = own_coefficients();
  bool wide = alone && any_unsafe(coefficients, square);
  while (mine-- > 0) {
    const Item item = mix.rows.item(mix.plan, block_index() + mine * blocks());
    if (!alone) wide = take_weights(mix.coefficients + item.segment * square, square, coefficients);
    mix_item<Row, vectors_of(R), R>(mix, item, coefficients, wide, kept_by(job), mine * steps_of_slot(mix.plan));
  }
}

template <class Row, int R>
__global__ void __launch_bounds__(kThreads, kIsDouble<Row>&& R == 8 ? 1 : 2)
    pcgrad_kernel(const __grid_constant__ PcgradJob job) {
  int64_t mine = 0;  // items of this block
  for (int64_t item = block_index(); item < job.gram.plan.items; item += blocks()) {
    const int64_t first_kept = mine++ * steps_of_slot(job.gram.plan);
    gram_columns<Row, R, 0, vectors_of(R)>(job.gram, item, 0, 0, kept_by(job), first_kept);
  }
  sync_grid();
  finish_gram_together<Row>(job.gram);

  const bool alone = job.gram.rows.problems == 1;
  if (alone) {
    solve_alone(job.solve, own_coefficients(), own_weights());
  } else {
    finish_solve(job.solve);
    sync_grid();
  }
  if (job.in_place) {
    mix_mine<Row, R>(job, mine, alone);
  } else {
    combine_mine<Row, R>(job, mine, alone);
  }
}

// What follows on the first pass above 8 rows, the same for all sizes of tiles.
template <class Row>
__device__ FPG_RARE void second_pass_of_tiles(const PcgradJob& job) {
  const Rows& rows = job.gram.rows;
  if (!job.in_place) {
    combine_all<Row, 1, kMostRowsHeld, Rows>({rows, job.plan, job.solve.weights},
                                             reinterpret_cast<double*>(shared_memory()));
    return;
  }
  if constexpr (!kIsDouble<Row>) {
    if (mix_columns(rows.tasks, sizeof(Row)) == 4) return mix_tiles<Row, 4>({rows, job.plan, job.solve.coefficients});
  }
  mix_tiles<Row, 1>({rows, job.plan, job.solve.coefficients});
}

// Above 8 rows nothing is kept but what the cache holds.
template <class Row, int G>
__global__ void __launch_bounds__(kThreads, 1) pcgrad_tiles_kernel(const __grid_constant__ PcgradJob job) {
  const Rows& rows = job.gram.rows;
  const int64_t tiles = pair_index(divide_up(rows.tasks, G == 0 ? 8 : 8 * G), 0);
  for (int64_t k = block_index(); k < job.gram.plan.items * tiles; k += blocks()) {
    gram_tile<Row, G>(job.gram, k / tiles, k % tiles);
  }
  sync_grid();
  finish_gram_together<Row>(job.gram);
  finish_solve(job.solve);
  sync_grid();
  second_pass_of_tiles<Row>(job);
}

inline int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }

template <class Row, int R>
int start_held(const Device& device, PcgradJob job, void* stream) {
  constexpr int64_t kBytesOfStep = vectors_of(R) * R * kThreads * static_cast<int64_t>(sizeof(Packed));
  const Plan& plan = job.gram.plan;
  const int64_t block_count = 2 * device.multiprocessors;
  int64_t shared_bytes = device.shared_per_multiprocessor / 2 - 1024;  // a block's own kilobyte is taken by the system
  if (shared_bytes > device.shared_per_block) shared_bytes = device.shared_per_block;
  job.kept = (shared_bytes - kBeforeKept) / kBytesOfStep;
  const int64_t needed = divide_up(plan.items, block_count) * (plan.span / plan.step);
  if (job.kept > needed) job.kept = needed;
  if (job.kept < 0) job.kept = 0;
  return run<pcgrad_kernel<Row, R>>(device, plan.items, kBeforeKept + job.kept * kBytesOfStep, true, stream, job);
}

template <class Row, int G>
int start_tiles(const Device& device, const PcgradJob& job, void* stream) {
  const int64_t tasks = job.gram.rows.tasks;
  const int64_t gram_bytes = most_of(gram_tile_bytes<G>(), solve_bytes(tasks));
  const int64_t mix_bytes = !job.in_place ? 0 : mix_tile_bytes(tasks, sizeof(Row));
  const int64_t block_count = most_of(job.gram.plan.items * tile_pairs(tasks, sizeof(Row)), job.plan.items);
  return run<pcgrad_tiles_kernel<Row, G>>(device, block_count, most_of(gram_bytes, mix_bytes), true, stream, job);
}

int start_together(const Device& device, const PcgradJob& job, int dtype, void* stream) {
  const int64_t tasks = job.gram.rows.tasks;
  return with_row_type(dtype, [&](auto type) {
    using Row = typename decltype(type)::type;
    if (tasks <= kMostRowsHeld) {
      return with_rows_held(tasks,
                            [&](auto held) { return start_held<Row, decltype(held)::value>(device, job, stream); });
    }
    return with_groups<Row>(
        tasks, [&](auto groups) { return start_tiles<Row, decltype(groups)::value>(device, job, stream); });
  });
}

int start_apart(const Device& device, const PcgradJob& job, int dtype, void* stream) {
  int error = start_gram(device, job.gram, dtype, stream);
  if (error == 0) error = start_finish(device, job.gram, job.solve, dtype, stream);
  if (error != 0) return error;
  if (job.in_place) return start_mix(device, {job.gram.rows, job.plan, job.solve.coefficients}, dtype, stream);
  return start_combine<Rows>(device, {job.gram.rows, job.plan, job.solve.weights}, dtype, stream);
}

int64_t one_launch_bytes(const Device& device) {
  for (const Crossover& line : kCrossovers) {
    if (line.architecture <= device.architecture) return line.one_launch_bytes;
  }
  return 0;
}

}  // namespace fpg

int fpg_cuda_pcgrad(void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype, const int64_t* offsets,
                    int64_t segments, const int64_t* order, int order_per_segment, int self_projection, double eps,
                    double min_squared_norm, double scale, double* gram, double* coefficients, double* weights,
                    void* out, void* workspace, int launches, void* stream) {
  if (!fpg::is_valid(tasks, width, dtype, segments)) return FPG_BAD_ARGUMENT;
  const int64_t itemsize = fpg::itemsize_of(dtype);
  const fpg::Rows rows = fpg::packed_rows(grads, tasks, width, row_stride, dtype, offsets, segments, out);
  const fpg::SolveJob solve = {gram,  order,    order_per_segment != 0, {self_projection != 0, eps, min_squared_norm},
                               tasks, segments, coefficients,           weights,
                               scale};
  const fpg::PcgradJob job = {fpg::gram_job(rows, dtype, gram, workspace), solve, fpg::columns_plan_of(rows, itemsize),
                              weights == nullptr, 0};
  fpg::Device device = {};
  if (const int error = fpg::find_device(&device)) return fpg::status_of(error);
  const bool small = tasks * width * itemsize <= fpg::one_launch_bytes(device);
  const bool together = launches == FPG_ONE_LAUNCH || (launches == FPG_AUTOMATIC && small);
  return fpg::status_of(together ? fpg::start_together(device, job, dtype, stream)
                                 : fpg::start_apart(device, job, dtype, stream));
}

int fpg_cuda_pcgrad_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks, int dtype,
                           const int64_t* order, int self_projection, double eps, double min_squared_norm, double scale,
                           double* gram, double* coefficients, double* weights, void* const* out, void* workspace,
                           void* stream) {
  const fpg::SolveJob solve = {gram,         order,   false, {self_projection != 0, eps, min_squared_norm}, tasks, 1,
                               coefficients, weights, scale};
  return fpg::with_blocks({rows, widths, blocks, tasks, dtype, nullptr, 1, out}, workspace, stream,
                          [&](const fpg::Device& device, const fpg::BlockRows& found, void* rest) {
                            const auto job = fpg::gram_job(found, dtype, gram, rest);
                            const fpg::Plan plan = fpg::columns_plan_of(found, fpg::itemsize_of(dtype));
                            int error = fpg::start_gram(device, job, dtype, stream);
                            if (error == 0) error = fpg::start_finish(device, job, solve, dtype, stream);
                            if (error != 0) return error;
                            return fpg::start_combine<fpg::BlockRows>(device, {found, plan, weights}, dtype, stream);
                          });
}
