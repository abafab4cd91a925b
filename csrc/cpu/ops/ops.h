// What the entry points do alike, and the passes that several of them make. Each op lies in the file of its name.
#pragma once

#include <cstdint>
#include <new>
#include <vector>

#include "../../fp32_range.h"
#include "../../solvers/pcgrad.h"
#include "../rows.h"
#include "../threads.h"

namespace fpg {

// body() gives a fpg_status. No exception crosses the C ABI.
template <class Body>
int guarded(Body body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return FPG_OUT_OF_MEMORY;
  }
}

// Makes the rows and works on them.
template <class Make, class Body>
int with_rows(Make make, Body body) {
  return guarded([&] {
    const Rows rows = make();
    if (!rows.valid()) return FPG_BAD_ARGUMENT;
    body(rows);
    return FPG_OK;
  });
}

inline int threads_for_pieces(int64_t tasks, int64_t width, int64_t pieces, int threads) {
  constexpr int64_t kLeastElements = 1 << 15;
  return threads_for(tasks * width, kLeastElements, pieces, threads);
}

// Runs body(piece, memory of this thread) for all pieces, the last ones first if asked.
template <class Body>
void for_each_piece(const Rows& rows, const std::vector<Piece>& pieces, int threads, int64_t bytes_of_each,
                    bool backwards, Body body) {
  const int64_t count = static_cast<int64_t>(pieces.size());
  const Threads used(threads_for_pieces(rows.tasks(), rows.width(), count, threads), bytes_of_each);
  for_each_part(count, used, backwards, [&](int64_t k, void* own) { body(pieces[static_cast<size_t>(k)], own); });
}

// body(k, memory of this thread) for k < count; a fpg_status. The problems are many and small: a thread takes its share
// of them at once, every so many-th, instead of asking for each.
template <class Body>
int for_each_problem(int64_t count, int64_t work, int64_t least_work, int threads, int64_t doubles_of_each, Body body) {
  return guarded([&] {
    const Threads used(threads_for(work, least_work, count, threads),
                       doubles_of_each * static_cast<int64_t>(sizeof(double)));
    for_each_part(used.count(), used, false, [&](int64_t first, void* own) {
      for (int64_t k = first; k < count; k += used.count()) body(k, static_cast<double*>(own));
    });
    return FPG_OK;
  });
}

// G of each problem, to `result`.
void gram(const Rows& rows, const std::vector<Piece>& pieces, double* result, int threads);

// C of each problem.
void solve(const SolveJob& job, int threads);

// `weights` [count, T]: each block takes those of its problem.
void combine(const Rows& rows, const std::vector<Piece>& pieces, const double* weights, int64_t count, int threads);

// J <- C J.
void mix(const Rows& rows, const std::vector<Piece>& pieces, const double* coefficients, int threads);

}  // namespace fpg
