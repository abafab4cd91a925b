// Projection onto the dual cone of the task gradients: v'J is the nearest vector to u'J that conflicts with no task
// gradient where v minimises v'Kv subject to v >= u. Once the set P of tasks with v > u is known, v is the solution of
// a linear system; tasks enter P and leave it by symmetric sweeps. First blocks of them at once (Portugal, Judice and
// Vicente 1994). Where that does not end, Lawson and Hanson's active set method: one task changes sides at a time and
// the objective falls with each P, so it ends; a task enters only if its gradient has a part outside the span of those
// in P, so a singular G is no obstacle.
#pragma once

#include "group.h"

namespace fpg {

struct DualCone {
  double norm_eps;
  double reg_eps;
};

// Squared distance of a unit gradient from the span of those in P, below which it is rounding.
constexpr double kDependent = 64 * kEps;
constexpr double kResidual = 1e-12;  // of what blocks of tasks found, relative to the sum of |u_t| |g_t|

struct ActiveSet {
  double* unit;   // K [T, T], unit diagonal
  double* swept;  // K swept on P: -K_PP^-1 within P, K_jP K_PP^-1 beside it, the Schur complement of K_PP outside
  double *norms, *bound, *values, *gradient, *held, *move, *column, *inside;
};

FPG_HOST_DEVICE int64_t scratch_doubles(const DualCone&, int64_t tasks) { return 2 * tasks * tasks + 8 * tasks; }

// In or out of P; the group's `column` holds row `task` of what is swept.
template <class Group>
FPG_HOST_DEVICE void sweep(const Group& group, const ActiveSet& p, int64_t tasks, int64_t task, double sign) {
  for_each(group, tasks, [&](int64_t i) { p.column[i] = p.swept[task * tasks + i]; });
  group.sync();
  const double pivot = p.column[task];
  group.sync();
  // With this entry one subtraction serves row and column of the task too, which become sign * column / pivot.
  if (group.lane == 0) p.column[task] = pivot - sign;
  group.sync();
  for (int64_t j = 0; j < tasks; ++j) {
    add_scaled(group, tasks, -p.column[j] / pivot, p.column, p.swept + j * tasks);
  }
  group.sync();
  if (group.lane == 0) p.swept[task * tasks + task] = -1 / pivot;
  group.sync();
}

// On all of P, from K. To sweep a task out would leave behind what its small pivot has made large, and its rounding.
template <class Group>
FPG_HOST_DEVICE void sweep_anew(const Group& group, const ActiveSet& p, int64_t tasks) {
  group.sync();
  for_each(group, tasks * tasks, [&](int64_t k) { p.swept[k] = p.unit[k]; });
  group.sync();
  for (int64_t task = 0; task < tasks; ++task) {
    if (p.inside[task] != 0) sweep(group, p, tasks, task, 1.0);
  }
}

// With P empty.
template <class Group>
FPG_HOST_DEVICE void begin(const Group& group, const ActiveSet& p, int64_t tasks) {
  group.sync();
  for_each(group, tasks, [&](int64_t i) {
    p.values[i] = p.bound[i];
    p.inside[i] = 0;
  });
  sweep_anew(group, p, tasks);
}

// gradient = K values; move: within P the step to the minimum, beside it what that step takes off the gradient.
template <class Group>
FPG_HOST_DEVICE void find_move(const Group& group, const ActiveSet& p, int64_t tasks) {
  multiply(group, p.unit, p.values, tasks, p.gradient);
  for_each(group, tasks, [&](int64_t i) { p.held[i] = p.gradient[i] * p.inside[i]; });
  group.sync();
  multiply(group, p.swept, p.held, tasks, p.move);
}

// How far from zero an entry of K v may be by rounding alone.
template <class Group>
FPG_HOST_DEVICE double rounding_of(const Group& group, const ActiveSet& p, int64_t tasks) {
  return 8 * kEps * sum_of(group, tasks, [&](int64_t i) { return std::fabs(p.values[i]); });
}

// Block principal pivoting: all tasks that are on the wrong side change sides at once. Takes few rounds, but may cycle,
// and knows no dependent tasks. Whether it ended with the minimum; else P and the values mean nothing.
template <class Group>
FPG_HOST_DEVICE bool pivot_blocks(const Group& group, const ActiveSet& p, int64_t tasks) {
  constexpr int kRounds = 16;  // most problems need two to six
  for (int round = 0; round < kRounds; ++round) {
    find_move(group, p, tasks);
    for_each(group, tasks, [&](int64_t i) {
      if (p.inside[i] != 0) {
        p.values[i] += p.move[i];
      } else {
        p.gradient[i] -= p.move[i];
      }
    });
    group.sync();
    const double rounding = rounding_of(group, p, tasks);
    for_each(group, tasks, [&](int64_t i) {
      p.held[i] = (p.inside[i] != 0 ? p.values[i] < p.bound[i] : p.gradient[i] < -rounding) ? 1.0 : 0.0;
    });
    group.sync();
    if (sum_of(group, tasks, [&](int64_t i) { return p.held[i]; }) == 0) {
      // A large residual means that K_PP is all but singular.
      multiply(group, p.unit, p.values, tasks, p.gradient);
      const double allowed = kResidual * sum_of(group, tasks, [&](int64_t i) { return std::fabs(p.bound[i]); });
      return sum_of(group, tasks, [&](int64_t i) {
               return std::fabs(p.gradient[i] * p.inside[i]) <= allowed && is_finite(p.values[i]) ? 0.0 : 1.0;
             }) == 0;
    }
    for (int64_t task = 0; task < tasks; ++task) {
      if (p.held[task] == 0) continue;
      const bool leaves = p.inside[task] != 0;
      const double pivot = p.swept[task * tasks + task];
      if (leaves ? !(pivot < 0 && is_finite(pivot)) : !(pivot > kDependent)) return false;
      sweep(group, p, tasks, task, leaves ? -1.0 : 1.0);
      if (group.lane == 0) {
        p.inside[task] = leaves ? 0.0 : 1.0;
        p.values[task] = p.bound[task];
      }
      group.sync();
    }
  }
  return false;
}

// One task at a time, from values that are nowhere below their bounds.
template <class Group>
FPG_HOST_DEVICE void activate(const Group& group, const ActiveSet& p, int64_t tasks) {
  const int64_t most = 16 * tasks + 32;  // three times T is much already; rounding must not make it endless
  for (int64_t step = 0; step < most; ++step) {
    find_move(group, p, tasks);
    const Place leaving = lowest_of(group, tasks, [&](int64_t i) {
      const double room = p.values[i] - p.bound[i];
      return p.inside[i] != 0 && room + p.move[i] < 0 ? room / -p.move[i] : 1.0;
    });
    const double room = p.values[leaving.index] - p.bound[leaving.index];
    const bool blocked = p.inside[leaving.index] != 0 && room + p.move[leaving.index] < 0;
    group.sync();
    for_each(group, tasks, [&](int64_t i) {
      if (p.inside[i] != 0) p.values[i] += leaving.value * p.move[i];
    });
    group.sync();
    const double rounding = rounding_of(group, p, tasks);
    const Place entering = lowest_of(group, tasks, [&](int64_t i) {
      const bool may = p.swept[i * tasks + i] > kDependent && p.inside[i] == 0;
      return may ? p.gradient[i] - p.move[i] + rounding : 0.0;
    });
    if (!blocked && !(entering.value < 0)) break;
    const int64_t task = blocked ? leaving.index : entering.index;
    if (group.lane == 0) {
      if (blocked) p.values[task] = p.bound[task];
      p.inside[task] = blocked ? 0.0 : 1.0;
    }
    group.sync();
    if (blocked) {
      sweep_anew(group, p, tasks);
    } else {
      sweep(group, p, tasks, task, 1.0);
    }
  }
}

// v [T] for u, which is u(t) for task t.
template <class Group, class Lower>
FPG_HOST_DEVICE void project(const Group& group, const DualCone& method, const double* gram, int64_t tasks, Lower lower,
                             double* projected, double* scratch) {
  const double trace = sum_of(group, tasks, [&](int64_t i) { return gram[i * tasks + i]; });
  if (!(trace > method.norm_eps)) {  // G counts as zero
    for_each(group, tasks, [&](int64_t i) { projected[i] = lower(i); });
    return;
  }
  const int64_t square = tasks * tasks;
  double* v = scratch + 2 * square;
  const ActiveSet p = {
      scratch,       scratch + square, v, v + tasks, v + 2 * tasks, v + 3 * tasks, v + 4 * tasks, v + 5 * tasks,
      v + 6 * tasks, v + 7 * tasks};
  for_each(group, tasks, [&](int64_t i) {
    const double norm = sqrt(gram[i * tasks + i] + method.reg_eps * trace);
    p.norms[i] = norm > 0 ? norm : 1.0;
    p.bound[i] = lower(i) * p.norms[i];
  });
  group.sync();
  for_each(group, square, [&](int64_t k) {
    const int64_t i = k / tasks, j = k % tasks;
    const bool is_there = gram[i * tasks + i] + method.reg_eps * trace > 0;
    p.unit[k] = i == j ? (is_there ? 1.0 : 0.0) : gram[k] / (p.norms[i] * p.norms[j]);
  });
  begin(group, p, tasks);
  if (!pivot_blocks(group, p, tasks)) begin(group, p, tasks);
  activate(group, p, tasks);
  for_each(group, tasks, [&](int64_t i) {
    const double value = p.values[i] / p.norms[i], least = lower(i);
    projected[i] = value < least ? least : value;
  });
}

}  // namespace fpg
