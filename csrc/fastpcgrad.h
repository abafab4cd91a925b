/* The C ABI of fastpcgrad's native libraries.
 *
 * Plain pointers and sizes, no torch headers: one build serves every torch and Python version.
 *
 * J is T rows of N elements, and comes in one of two forms. Packed: element (t, n) lies at data + t * row_stride + n,
 * in elements. `offsets` cuts the columns into `segments` ranges: offsets[0] = 0, offsets[segments] = N,
 * non-decreasing; a null `offsets` with segments = 1 means all columns. In blocks (functions that end in _blocks):
 * rows[t * blocks + b] is where widths[b] columns of row t lie, null where they are all zero. Each segment, or each
 * problem that blocks are assigned to, has a T x T matrix or T weights of its own. Rows need no alignment beyond their
 * element's. All matrices and weights are dense, row-major float64.
 *
 * Every entry point returns FPG_OK or another fpg_status, and writes nothing unless it returns FPG_OK. Pointers are
 * not checked: shapes, devices and types are validated by the caller.
 */
#ifndef FASTPCGRAD_H
#define FASTPCGRAD_H

#include <stdint.h>

#define FPG_ABI_VERSION 7
#define FPG_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { FPG_F32 = 0, FPG_F16 = 1, FPG_BF16 = 2, FPG_F64 = 3 } fpg_dtype;

typedef enum {
  FPG_OK = 0,
  FPG_BAD_ARGUMENT = 1,  /* an unknown dtype, or a negative size */
  FPG_OUT_OF_MEMORY = 2, /* no room for the partial sums */
} fpg_status;

/* FPG_ABI_VERSION of the library that was loaded. */
FPG_EXPORT int fpg_abi_version(void);

/* The instruction set in use: "avx512", "avx2" or "baseline". */
FPG_EXPORT const char* fpg_cpu_isa(void);

/* Use another instruction set from now on. FPG_BAD_ARGUMENT if this machine or this build lacks it. Not thread-safe. */
FPG_EXPORT int fpg_cpu_use_isa(const char* name);

/* gram[s] = J_s J_s^T. `gram` is [segments, T, T]. */
FPG_EXPORT int fpg_cpu_gram(const void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                            const int64_t* offsets, int64_t segments, double* gram, int threads);

/* PCGrad's projections on `segments` Gram matrices. `order` is [T, T], or [segments, T, T] when order_per_segment.
 * Row i of coefficients[s] combines the task gradients into g_i'. An index outside 0..T-1 makes its row NaN.
 * One thread does it: `threads` is there for the entry points to be alike. */
FPG_EXPORT int fpg_cpu_pcgrad_coefficients(const double* gram, int64_t tasks, int64_t segments, const int64_t* order,
                                           int order_per_segment, int self_projection, double eps,
                                           double min_squared_norm, double* coefficients, int threads);

/* out = weights[s] J_s for each segment. `weights` is [segments, T]; `out` is [N] of J's type and may be a row of J. */
FPG_EXPORT int fpg_cpu_combine(const void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                               const int64_t* offsets, int64_t segments, const double* weights, void* out, int threads);

/* J_s <- coefficients[s] J_s for each segment, in place. */
FPG_EXPORT int fpg_cpu_mix(void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                           const int64_t* offsets, int64_t segments, const double* coefficients, int threads);

/* gram, projections, weights = scale * (column sums of C), and out = weights J, in one call. A null `out` replaces J by
 * C J instead; `weights` is not written then. */
FPG_EXPORT int fpg_cpu_pcgrad(void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                              const int64_t* offsets, int64_t segments, const int64_t* order, int order_per_segment,
                              int self_projection, double eps, double min_squared_norm, double scale, double* gram,
                              double* coefficients, double* weights, void* out, int threads);

/* As fpg_cpu_gram. Block b counts for problem problem_of[b], for none where that is -1; a null `problem_of` means 0 for
 * all. `gram` is [problems, T, T]. */
FPG_EXPORT int fpg_cpu_gram_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks,
                                   int dtype, const int64_t* problem_of, int64_t problems, double* gram, int threads);

/* The most bytes that the entry points for blocks take for as long as they run, of blocks with such widths. */
FPG_EXPORT int64_t fpg_cpu_workspace_blocks(const int64_t* widths, int64_t blocks, int64_t tasks, int threads);

/* out[b] = weights[weights_of[b]] J_b for each block; a null `weights_of` means 0 for all. `weights` is [count, T].
 * out[b] may be one of the block's rows. */
FPG_EXPORT int fpg_cpu_combine_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks,
                                      int dtype, const int64_t* weights_of, int64_t count, const double* weights,
                                      void* const* out, int threads);

/* As fpg_cpu_pcgrad, one problem of all blocks, merged to out[b]. `order` is [T, T]. */
FPG_EXPORT int fpg_cpu_pcgrad_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks,
                                     int dtype, const int64_t* order, int self_projection, double eps,
                                     double min_squared_norm, double scale, double* gram, double* coefficients,
                                     double* weights, void* const* out, int threads);

/* The same of rows without gaps, merged to the first of them, with all arguments in one piece of memory: where J is
 * small, the caller takes longer to pass each than the surgery does. Behind the struct lie the order, [T, T], and then
 * the rows. `figures`: G, C and w, one behind the other. */
typedef struct {
  const int64_t* widths;
  int64_t blocks, tasks, dtype, self_projection, threads;
  double eps, min_squared_norm, scale;
  double* figures;
} fpg_small_pcgrad;

FPG_EXPORT int fpg_cpu_small_pcgrad(const fpg_small_pcgrad* call);

/* What needs the rows themselves. rows[t] is where the `width` columns of row t lie, null where they are all zero. */

/* In each column the sums of the positive and of the negative entries times their row's weight (1 where `weights` [T]
 * is null): `sums` is [2, width], float64 for float64 rows, else float32. NaN counts as negative. */
FPG_EXPORT int fpg_cpu_sign_sums(const void* const* rows, int64_t tasks, int64_t width, int dtype,
                                 const double* weights, void* sums, int threads);

/* In each column the mean of the entries without the `trim` largest and as many smallest; NaN where one is not finite.
 * `network` [2, comparators] sorts T entries: pairs of places to compare and exchange in turn. `out` is [width] of the
 * rows' type and may be one of them. FPG_BAD_ARGUMENT unless 2 trim < T and all places are within 0..T-1. */
FPG_EXPORT int fpg_cpu_trimmed_mean(const void* const* rows, int64_t tasks, int64_t width, int dtype,
                                    const int32_t* network, int64_t comparators, int64_t trim, void* out, int threads);

/* The T x T problems of the methods, and their two parameters. FRANK_WOLFE: MGDA's steps (epsilon, most steps);
 * SHORTEST_POINT: MGDA's minimum (none); CONFLICT_AVERSE: CAGrad (c, norm_eps); FAIRNESS: G x = x^(-1/alpha) (alpha,
 * most steps); PROJECT_EACH and PROJECT_ONE: the preferred vectors projected onto the dual cone of the task gradients,
 * that of each task or their sum (norm_eps, reg_eps); ALIGNED: Aligned-MTL (0 min, 1 median, 2 rmse; the eps of which
 * eigenvalues are rounding); IMPARTIAL: IMTL-G (none); CONFLICT_FREE: ConFIG (none). */
typedef enum {
  FPG_FRANK_WOLFE = 0,
  FPG_SHORTEST_POINT = 1,
  FPG_CONFLICT_AVERSE = 2,
  FPG_FAIRNESS = 3,
  FPG_PROJECT_EACH = 4,
  FPG_PROJECT_ONE = 5,
  FPG_ALIGNED = 6,
  FPG_IMPARTIAL = 7,
  FPG_CONFLICT_FREE = 8,
} fpg_solver;

/* answers[s] [T], for PROJECT_EACH [T, T], on `problems` symmetric Gram matrices; NaN where one is not finite.
 * `preference` [T] is for the projections, ALIGNED and CONFLICT_FREE, 1 / T each where null. */
FPG_EXPORT int fpg_cpu_method_weights(int solver, const double* gram, int64_t tasks, int64_t problems,
                                      const double* parameters, const double* preference, double* answers, int threads);

/* GradVac on `problems` symmetric Gram matrices [T, T]: coefficients, and the running targets of the cosines, updated
 * in place. places[s][i] is i, then the other tasks in the order of their turns. Where G is not finite, or a place is
 * none, the coefficients are NaN and the targets stay. */
FPG_EXPORT int fpg_cpu_gradvac(const double* gram, const int64_t* places, int64_t tasks, int64_t problems, double beta,
                               double eps, double* targets, double* coefficients, int threads);

/* Rows of `permutations` [count, size], as torch.randperm makes them one after the other on a CPU: each place but the
 * last is exchanged with itself or one behind it, by 32 random bits. A number of `bits` has two of these, the first in
 * its upper half. One thread does it, see fpg_cpu_pcgrad_coefficients. */
FPG_EXPORT int fpg_cpu_permutations(const uint64_t* bits, int64_t count, int64_t size, int64_t* permutations,
                                    int threads);

/* The CUDA library. It has fpg_abi_version and what follows; all pointers to data are the device's, of the device that
 * is current in the calling thread. Work is queued on `stream` (a cudaStream_t) and never waited for, nothing is
 * allocated, and no value is read back, so a call can be captured in a CUDA graph. Besides the statuses above an entry
 * point may return 1000 + a cudaError_t. T is at most 256. */

/* What a status means, in the CUDA runtime's words where it comes from there. */
FPG_EXPORT const char* fpg_cuda_error(int status);

/* FPG_OK where the current device can run this library. */
FPG_EXPORT int fpg_cuda_probe(void);

/* Bytes of `workspace` that gram and pcgrad need, aligned to 8. Its contents do not matter. */
FPG_EXPORT int64_t fpg_cuda_workspace(int64_t tasks, int64_t width, int64_t segments, int dtype);

/* As the entry points of the CPU library. */
FPG_EXPORT int fpg_cuda_gram(const void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                             const int64_t* offsets, int64_t segments, double* gram, void* workspace, void* stream);
FPG_EXPORT int fpg_cuda_combine(const void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                                const int64_t* offsets, int64_t segments, const double* weights, void* out,
                                void* stream);
FPG_EXPORT int fpg_cuda_mix(void* grads, int64_t tasks, int64_t width, int64_t row_stride, int dtype,
                            const int64_t* offsets, int64_t segments, const double* coefficients, void* stream);

/* Where PCGrad's order lies: one for all segments or one each, in the device's memory; or one for all, of at most 16
 * tasks, in the host's. That is done with when the call returns, and a captured call replays it. */
typedef enum { FPG_ORDER_FOR_ALL = 0, FPG_ORDER_PER_SEGMENT = 1, FPG_ORDER_ON_HOST = 2 } fpg_order;

/* As the entry point of the CPU library. */
FPG_EXPORT int fpg_cuda_pcgrad_coefficients(const double* gram, int64_t tasks, int64_t segments, const int64_t* order,
                                            int order_kind, int self_projection, double eps, double min_squared_norm,
                                            double* coefficients, void* stream);

/* How pcgrad runs: by the size of J, as one cooperative launch, or as one launch for each pass and one between them.
 * The results are the same to the bit. Null `weights` replace J by C J instead; `out` is not used then, and above 8
 * rows there are several launches always. */
typedef enum { FPG_AUTOMATIC = 0, FPG_ONE_LAUNCH = 1, FPG_SEVERAL_LAUNCHES = 2 } fpg_launches;

/* The arguments in one piece of memory: where J is small, the caller takes longer to pass each than the device to do
 * the work. `order_kind` is a fpg_order, `launches` a fpg_launches. */
typedef struct {
  void* grads;
  int64_t tasks, width, row_stride, dtype;
  const int64_t* offsets;
  int64_t segments;
  const int64_t* order;
  int64_t order_kind, self_projection;
  double eps, min_squared_norm, scale;
  double *gram, *coefficients, *weights;
  void *out, *workspace;
  int64_t launches;
} fpg_cuda_surgery;

FPG_EXPORT int fpg_cuda_pcgrad(const fpg_cuda_surgery* call, void* stream);

/* As the entry point of the CPU library; `parameters` lie in the host's memory. Bytes of `workspace`, aligned to 8,
 * come from fpg_cuda_method_workspace, which is negative for an unknown solver. */
FPG_EXPORT int64_t fpg_cuda_method_workspace(int solver, int64_t tasks, int64_t problems);
FPG_EXPORT int fpg_cuda_method_weights(int solver, const double* gram, int64_t tasks, int64_t problems,
                                       const double* parameters, const double* preference, double* answers,
                                       void* workspace, void* stream);

/* As the entry point of the CPU library. */
FPG_EXPORT int fpg_cuda_gradvac(const double* gram, const int64_t* places, int64_t tasks, int64_t problems, double beta,
                                double eps, double* targets, double* coefficients, void* stream);

/* As the entry points of the CPU library. `rows`, `widths`, `problem_of`, `weights_of` and `out` lie in the host's
 * memory and are done with when the call returns; what they point to, and all else, on the device. A captured call
 * replays with the same pointers. Bytes of `workspace`, aligned to 8, come from fpg_cuda_workspace_blocks, with the
 * widths of all blocks and problems = 1 for pcgrad; of combine, from fpg_cuda_combine_workspace_blocks. The former grow
 * with T^2 for each block: the caller bounds how many blocks a call has. A row that is null takes part in nothing,
 * whatever the others and its weight hold; blocks without a row are left out. */
FPG_EXPORT int64_t fpg_cuda_workspace_blocks(const int64_t* widths, int64_t blocks, int64_t tasks, int dtype,
                                             int64_t problems);
FPG_EXPORT int64_t fpg_cuda_combine_workspace_blocks(int64_t blocks, int64_t tasks, int64_t count);
FPG_EXPORT int fpg_cuda_gram_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks,
                                    int dtype, const int64_t* problem_of, int64_t problems, double* gram,
                                    void* workspace, void* stream);
FPG_EXPORT int fpg_cuda_combine_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks,
                                       int dtype, const int64_t* weights_of, int64_t count, const double* weights,
                                       void* const* out, void* workspace, void* stream);
FPG_EXPORT int fpg_cuda_pcgrad_blocks(const void* const* rows, const int64_t* widths, int64_t blocks, int64_t tasks,
                                      int dtype, const int64_t* order, int order_kind, int self_projection, double eps,
                                      double min_squared_norm, double scale, double* gram, double* coefficients,
                                      double* weights, void* const* out, void* workspace, void* stream);

#ifdef __cplusplus
}
#endif
#endif
