// pcgrad: the whole surgery. Small and middle J: one cooperative launch, in which each block keeps what it can of its
// columns in shared memory from the first pass to the second. Large J, and J in blocks: a launch for each pass and one
// between them.
#include "blocks.h"
#include "gram_tensor.h"
#include "grid.h"
#include "launch.h"

namespace fpg {

struct PcgradJob {
  GramJob<Rows> gram;
  OrderedJob solve;
  Plan plan;      // of the second pass
  bool in_place;  // J <- C J; no weights and no out
};

// Shared memory of the kernel below: the sums of gram, or what lies between the passes; then their result; then the
// ring.
constexpr int kHeldSquare = kMostRowsHeld * kMostRowsHeld;
struct Problem {
  double dots[kWarps * kMostRowsHeld];
  double gram[kHeldSquare];
  int64_t order[kHeldSquare];
  double narrow[kHeldSquare];  // coefficients or weights as they are multiplied
};
struct Solved {
  double coefficients[kHeldSquare];
  double weights[kMostRowsHeld];
};
constexpr int kBeforeSolved = column_sums_bytes(kMostRowsHeld, 0);
constexpr int kBeforeRing = kBeforeSolved + static_cast<int>(sizeof(Solved));
static_assert(sizeof(Problem) <= kBeforeSolved && kBeforeRing % 16 == 0, "the parts do not overlap");

__device__ inline Problem& own_problem() { return *reinterpret_cast<Problem*>(shared_memory()); }
__device__ inline Solved& own_solved() { return *reinterpret_cast<Solved*>(shared_memory() + kBeforeSolved); }

template <int R>
using RingOf = Ring<column_vectors(R, 0, vectors_of(R))>;
template <int R>
__device__ inline RingOf<R> own_ring() {
  return {reinterpret_cast<Packed*>(shared_memory() + kBeforeRing)};
}

// Copies G and the order; whether a row of G was out of range.
__device__ inline bool take_problem(const OrderedJob& job, Problem& problem) {
  const int64_t tasks = job.tasks;
  const Order order = order_of(job, 0);
  bool flagged = false;
  for (int64_t k = thread_index(); k < tasks * tasks; k += kThreads) {
    const double product = job.gram[k];
    problem.gram[k] = product;
    problem.order[k] = order[k];
    flagged = flagged || (k % (tasks + 1) == 0 && flag_of(product) != kRight);
  }
  return any_in_block(flagged);
}

// One problem's C and weights by each block for itself, which costs less than to wait for another's.
__device__ inline void solve_alone(const OrderedJob& job, Problem& problem, Solved& solved) {
  const int64_t tasks = job.tasks;
  double* dots = problem.dots + thread_index() / 32 * tasks;
  for (int64_t i = thread_index() / 32; i < tasks; i += kWarps) {
    solve_row(job, problem.gram, problem.order + i * tasks, i, solved.coefficients + i * tasks, dots);
  }
  sync_block();
  for (int64_t k = thread_index(); k < tasks; k += kThreads) {
    solved.weights[k] = merged_weight(solved.coefficients, tasks, k, job.scale);
  }
  sync_block();
  if (block_index() != 0) return;
  for (int64_t k = thread_index(); k < tasks * tasks; k += kThreads) job.coefficients[k] = solved.coefficients[k];
  if (job.weights == nullptr) return;
  for (int64_t k = thread_index(); k < tasks; k += kThreads) job.weights[k] = solved.weights[k];
}

__device__ inline int steps_of_slot(const Plan& plan) { return static_cast<int>(plan.span / plan.step); }

// The two second passes over the items of this block, last ones first: the ring has their last steps. `alone`: with the
// weights or coefficients that solve_alone left.
template <class Row, int R>
__device__ inline void combine_mine(const PcgradJob& job, int mine, bool alone) {
  const Rows& rows = job.gram.rows;
  const Plan& plan = job.gram.plan;
  const Kept<RingOf<R>::kVectors> kept = {own_ring<R>(), mine * steps_of_slot(plan) - RingOf<R>::kStages};
  auto* weights = reinterpret_cast<Accumulator<Row>*>(own_problem().narrow);
  const double* exact = nullptr;
  const auto take = [&](const double* given) { exact = take_weights(given, rows.tasks, weights) ? given : nullptr; };
  if (alone) take(own_solved().weights);
  while (mine-- > 0) {
    const Item item = rows.item(plan, block_index() + mine * blocks());
    if (!alone) take(job.solve.weights + item.segment * rows.tasks);
    combine_item<Row, vectors_of(R), R>(rows, plan, item, weights, exact, kept, mine * steps_of_slot(plan));
  }
}

template <class Row, int R>
__device__ inline void mix_mine(const PcgradJob& job, int mine, bool alone) {
  const MixJob mix = {job.gram.rows, job.gram.plan, job.solve.coefficients};
  const int64_t square = static_cast<int64_t>(mix.rows.tasks) * mix.rows.tasks;
  const Kept<RingOf<R>::kVectors> kept = {own_ring<R>(), mine * steps_of_slot(mix.plan) - RingOf<R>::kStages};
  auto* coefficients = reinterpret_cast<Accumulator<Row>*>(own_problem().narrow);
  const double* exact = nullptr;
  const auto take = [&](const double* given) { exact = take_weights(given, square, coefficients) ? given : nullptr; };
  if (alone) take(own_solved().coefficients);
  while (mine-- > 0) {
    const Item item = mix.rows.item(mix.plan, block_index() + mine * blocks());
    if (!alone) take(mix.coefficients + item.segment * square);
    mix_item<Row, vectors_of(R), R>(mix, item, coefficients, exact, kept, mine * steps_of_slot(mix.plan));
  }
}

template <class Row, int R>
__global__ void __launch_bounds__(kThreads, kIsDouble<Row>&& R == 8 ? 1 : 2)
    pcgrad_kernel(const __grid_constant__ PcgradJob job) {
  int mine = 0;  // items of this block
  for (int64_t item = block_index(); item < job.gram.plan.items; item += blocks()) {
    const int first_number = mine++ * steps_of_slot(job.gram.plan);
    gram_columns<Row, R, 0, vectors_of(R), true>(job.gram, item, 0, 0, reinterpret_cast<double*>(shared_memory()),
                                                 own_ring<R>(), first_number);
  }
  sync_grid();

  const bool alone = job.gram.rows.problems == 1;
  if (alone) {
    reduce(job.gram, false);
    sync_grid();
    const bool flagged = take_problem(job.solve, own_problem());
    if constexpr (!kIsDouble<Row>) {
      if (job.gram.guarded && flagged) {
        redo_flagged<Row>(job.gram);
        take_problem(job.solve, own_problem());
      }
    }
    solve_alone(job.solve, own_problem(), own_solved());
  } else {
    finish_gram<Row>(job.gram);
    finish_solve(job.solve);
    sync_grid();
  }
  if (job.in_place) {
    mix_mine<Row, R>(job, mine, alone);
  } else {
    combine_mine<Row, R>(job, mine, alone);
  }
}

// Above 8 rows nothing is kept but what the cache holds. For J <- C J there are launches of their own.
template <class Row, int G, bool kMany>
__global__ void __launch_bounds__(kThreads, G == 0 || G == 8 ? 1 : 2)
    pcgrad_tiles_kernel(const __grid_constant__ PcgradJob job) {
  const Rows& rows = job.gram.rows;
  const int64_t tiles = kMany ? tiles_of_gram(rows.tasks, sizeof(Row)) : 1;
  for (int64_t k = block_index(); k < job.gram.plan.items * tiles; k += blocks()) {
    gram_tile<Row, G, kMany>(job.gram, k / tiles, k % tiles);
  }
  sync_grid();
  finish_gram<Row>(job.gram);
  finish_solve(job.solve);
  sync_grid();
  combine_all<Row, 1, kMostRowsHeld, Rows>({rows, job.plan, job.solve.weights},
                                           reinterpret_cast<double*>(shared_memory()));
}

inline int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }

template <class Row, int R>
int start_held(const Device& device, const PcgradJob& job, void* stream) {
  return run<pcgrad_kernel<Row, R>>(device, job.gram.plan.items, kBeforeRing + RingOf<R>::kBytes, true, stream, job);
}

template <class Row, int G, bool kMany>
int start_tiles(const Device& device, const PcgradJob& job, void* stream) {
  const int64_t tasks = job.gram.rows.tasks;
  const int64_t shared_bytes = most_of(gram_tile_bytes<G>(), solve_bytes(tasks));
  const int64_t block_count = most_of(job.gram.plan.items * tiles_of_gram(tasks, sizeof(Row)), job.plan.items);
  return run<pcgrad_tiles_kernel<Row, G, kMany>>(device, block_count, shared_bytes, true, stream, job);
}

int start_together(const Device& device, const PcgradJob& job, int dtype, void* stream) {
  const int64_t tasks = job.gram.rows.tasks;
  return with_row_type(dtype, [&](auto type) {
    using Row = typename decltype(type)::type;
    if (tasks <= kMostRowsHeld) {
      return with_rows_held(tasks,
                            [&](auto held) { return start_held<Row, decltype(held)::value>(device, job, stream); });
    }
    return with_tiles<Row>(tasks, [&](auto groups, auto many) {
      return start_tiles<Row, decltype(groups)::value, decltype(many)::value>(device, job, stream);
    });
  });
}

int start_apart(const Device& device, const PcgradJob& job, int dtype, void* stream) {
  int error = start_gram(device, job.gram, dtype, stream);
  if (error == 0) error = start_finish(device, job.gram, job.solve, dtype, stream);
  if (error != 0) return error;
  if (job.in_place) return start_mix(device, {job.gram.rows, job.plan, job.solve.coefficients}, dtype, stream);
  return start_combine<Rows>(device, {job.gram.rows, job.plan, job.solve.weights}, dtype, stream);
}

int64_t one_launch_bytes(const Device& device, int64_t tasks) {
  for (const Crossover& line : kCrossovers) {
    if (line.architecture <= device.architecture) return tasks <= kMostRowsHeld ? line.held_bytes : line.tiles_bytes;
  }
  return 0;
}

}  // namespace fpg

int fpg_cuda_pcgrad(const fpg_cuda_surgery* call, void* stream) {
  const int64_t tasks = call->tasks;
  const int dtype = static_cast<int>(call->dtype);
  if (!fpg::is_valid(tasks, call->width, dtype, call->segments)) return FPG_BAD_ARGUMENT;
  const fpg::Rows rows = fpg::packed_rows(call->grads, tasks, call->width, call->row_stride, dtype, call->offsets,
                                          call->segments, call->out);
  const fpg::Projection projection = {call->self_projection != 0, call->eps, call->min_squared_norm};
  fpg::OrderedJob solve = {{call->gram, call->order, false, projection, tasks, call->segments, call->coefficients,
                            call->weights, call->scale},
                           false,
                           {}};
  if (!fpg::take_order(solve, call->order_kind)) return FPG_BAD_ARGUMENT;
  fpg::Device device = {};
  if (const int error = fpg::find_device(&device)) return fpg::status_of(error);
  const int64_t itemsize = fpg::itemsize_of(dtype);
  const fpg::PcgradJob job = {fpg::gram_job(rows, dtype, call->gram, call->workspace), solve,
                              fpg::columns_plan_of(rows, itemsize), call->weights == nullptr};
  const bool small = tasks * call->width * itemsize <= fpg::one_launch_bytes(device, tasks);
  const bool can = call->weights != nullptr || tasks <= fpg::kMostRowsHeld;
  const bool together = can && (call->launches == FPG_ONE_LAUNCH || (call->launches == FPG_AUTOMATIC && small));
  return fpg::status_of(together ? fpg::start_together(device, job, dtype, stream)
                                 : fpg::start_apart(device, job, dtype, stream));
}

int fpg_cuda_pcgrad_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks, int dtype,
                           const int64_t* order, int order_kind, int self_projection, double eps,
                           double min_squared_norm, double scale, double* gram, double* coefficients, double* weights,
                           void* const* out, void* workspace, void* stream) {
  const fpg::Projection projection = {self_projection != 0, eps, min_squared_norm};
  fpg::OrderedJob solve = {{gram, order, false, projection, tasks, 1, coefficients, weights, scale}, false, {}};
  if (!fpg::take_order(solve, order_kind)) return FPG_BAD_ARGUMENT;
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
