// Every solver by its number, and what a group does for one of the vectors that are asked for.
#pragma once

#include "../fastpcgrad.h"
#include "dual_cone.h"
#include "fairness.h"
#include "frank_wolfe.h"
#include "group.h"
#include "simplex.h"
#include "spectrum.h"

namespace fpg {

// The vector of each task is projected: T answers a problem.
struct ProjectEach : DualCone {};
// The combination by preference is projected.
struct ProjectOne : DualCone {};

struct SolverJob {
  const double* gram;        // [problems, T, T]
  const double* preference;  // [T], null: 1 / T each
  double* answers;           // [problems, answers a problem, T]
  int64_t tasks;
  int64_t problems;
};

template <class Method>
FPG_HOST_DEVICE int64_t answers_of(const Method&, int64_t) {
  return 1;
}
FPG_HOST_DEVICE int64_t answers_of(const ProjectEach&, int64_t tasks) { return tasks; }

FPG_HOST_DEVICE double preferred(const SolverJob& job, int64_t task) {
  return job.preference ? job.preference[task] : 1.0 / static_cast<double>(job.tasks);
}

template <class Group, class Method>
FPG_HOST_DEVICE void answer(const Group& group, const Method& method, const SolverJob&, const double* gram, int64_t,
                            int64_t tasks, double* to, double* scratch) {
  solve(group, method, gram, tasks, to, scratch);
}
template <class Group>
FPG_HOST_DEVICE void answer(const Group& group, const ProjectEach& method, const SolverJob& job, const double* gram,
                            int64_t row, int64_t tasks, double* to, double* scratch) {
  project(group, method, gram, tasks, [&](int64_t t) { return t == row ? preferred(job, t) : 0.0; }, to, scratch);
}
template <class Group>
FPG_HOST_DEVICE void answer(const Group& group, const ProjectOne& method, const SolverJob& job, const double* gram,
                            int64_t, int64_t tasks, double* to, double* scratch) {
  project(group, method, gram, tasks, [&](int64_t t) { return preferred(job, t); }, to, scratch);
}

template <class Group>
FPG_HOST_DEVICE void answer(const Group& group, const Aligned& method, const SolverJob& job, const double* gram,
                            int64_t, int64_t tasks, double* to, double* scratch) {
  align(group, method, gram, tasks, [&](int64_t t) { return preferred(job, t); }, to, scratch);
}
template <class Group>
FPG_HOST_DEVICE void answer(const Group& group, const ConflictFree&, const SolverJob& job, const double* gram, int64_t,
                            int64_t tasks, double* to, double* scratch) {
  point_conflict_free(group, gram, tasks, [&](int64_t t) { return preferred(job, t); }, to, scratch);
}

// Answer `k` of all; NaN where its G is not finite.
template <class Group, class Method>
FPG_HOST_DEVICE void answer(const Group& group, const Method& method, const SolverJob& job, int64_t k,
                            double* scratch) {
  const int64_t tasks = job.tasks, each = answers_of(method, tasks);
  const double* gram = job.gram + k / each * tasks * tasks;
  double* to = job.answers + k * tasks;
  if (all_finite(group, gram, tasks)) {
    answer(group, method, job, gram, k % each, tasks, to, scratch);
  } else {
    for_each(group, tasks, [&](int64_t t) { to[t] = __builtin_nan(""); });
  }
}

// body(method) for a fpg_solver and its parameters.
template <class Body>
int with_solver(int solver, const double* parameters, Body body) {
  const double a = parameters[0], b = parameters[1];
  switch (solver) {
    case FPG_FRANK_WOLFE: return body(FrankWolfe{a, b});
    case FPG_SHORTEST_POINT: return body(ShortestPoint{});
    case FPG_CONFLICT_AVERSE: return body(ConflictAverse{a, b});
    case FPG_FAIRNESS: return body(Fairness{a, b});
    case FPG_PROJECT_EACH: return body(ProjectEach{{a, b}});
    case FPG_PROJECT_ONE: return body(ProjectOne{{a, b}});
    case FPG_ALIGNED: return body(Aligned{a, b});
    case FPG_IMPARTIAL: return body(Impartial{});
    case FPG_CONFLICT_FREE: return body(ConflictFree{});
    default: return FPG_BAD_ARGUMENT;
  }
}

}  // namespace fpg
