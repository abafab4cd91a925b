// The convex problem that Nash-MTL and FairGrad share: G x = x^(-1/alpha) with x > 0, by damped Newton. With
// y_i = |g_i| x_i and the cosines K it reads (K y)_i = (|g_i| / y_i)^(1/alpha) / |g_i|, so gradients of very different
// lengths do no harm.
#pragma once

#include "group.h"

namespace fpg {

// Added to the unit diagonal of the cosines. At a Pareto-stationary point there is no solution and x would grow without
// bound; with the ridge x_i |g_i| stays below sqrt(T / kRidge) for alpha = 1. Where it changes little the problem is
// then solved without it.
constexpr double kRidge = 1e-10;
constexpr double kBackwardError = 1e-14;  // stop where both sides agree to this part of the terms they are made of
constexpr double kSmallest = 1e-200;      // what no y falls below, so that nothing overflows

struct Fairness {
  double alpha;
  double max_iters;  // with the ridge and again without it
};

struct Newton {
  double* cosines;  // [T, T]
  double* system;   // [T, T + 1]
  double *norms, *y, *shares, *residual, *step, *trial;
  double power;
  double max_iters;
};

FPG_HOST_DEVICE int64_t scratch_doubles(const Fairness&, int64_t tasks) { return 2 * tasks * tasks + 8 * tasks; }

// shares and residual of y.
template <class Group>
FPG_HOST_DEVICE void evaluate(const Group& group, const Newton& p, const double* y, int64_t tasks) {
  multiply(group, p.cosines, y, tasks, p.residual);
  for_each(group, tasks, [&](int64_t i) {
    // Not a product of powers: they may leave the range of numbers where their product does not.
    p.shares[i] = pow(p.norms[i] / y[i], p.power) / p.norms[i];
    p.residual[i] -= p.shares[i];
  });
  group.sync();
}

template <class Group>
FPG_HOST_DEVICE void newton(const Group& group, const Newton& p, int64_t tasks) {
  evaluate(group, p, p.y, tasks);
  for (int64_t done = 0; static_cast<double>(done) < p.max_iters; ++done) {
    const double unsolved = sum_of(group, tasks, [&](int64_t i) {
      double terms = p.shares[i];
      for (int64_t j = 0; j < tasks; ++j) terms += std::fabs(p.cosines[j * tasks + i]) * p.y[j];
      return std::fabs(p.residual[i]) <= kBackwardError * terms ? 0.0 : 1.0;
    });
    if (unsolved == 0) break;
    const int64_t width = tasks + 1;
    for_each(group, tasks * width, [&](int64_t k) {
      const int64_t i = k / width, j = k % width;
      double value = j == tasks ? -p.residual[i] : p.cosines[i * tasks + j];
      if (i == j) value += p.power * p.shares[i] / p.y[i];
      p.system[k] = value;
    });
    group.sync();
    if (!solve_linear(group, p.system, tasks, 1)) break;
    for_each(group, tasks, [&](int64_t i) { p.step[i] = p.system[i * width + tasks]; });
    group.sync();
    const double slope = dot(group, p.residual, p.step, tasks);
    const double inward = highest_of(group, tasks, [&](int64_t i) { return -p.step[i] / p.y[i]; });
    double length = 0.95 / (inward > 0.95 ? inward : 0.95);
    while (true) {
      for_each(group, tasks, [&](int64_t i) {
        const double value = p.y[i] + length * p.step[i];
        p.trial[i] = value > kSmallest ? value : kSmallest;
      });
      group.sync();
      evaluate(group, p, p.trial, tasks);
      // The slope along the step grows, from below zero; well past its zero the step is too long.
      if (!(dot(group, p.residual, p.step, tasks) > -0.5 * slope && length > 1e-6)) break;
      length /= 2;
    }
    for_each(group, tasks, [&](int64_t i) { p.y[i] = p.trial[i]; });
    group.sync();
  }
}

template <class Group>
FPG_HOST_DEVICE void solve(const Group& group, const Fairness& method, const double* gram, int64_t tasks,
                           double* weights, double* scratch) {
  const int64_t square = tasks * tasks;
  double* vectors = scratch + 2 * square + tasks;
  Newton p = {scratch,
              scratch + square,
              vectors,
              vectors + tasks,
              vectors + 2 * tasks,
              vectors + 3 * tasks,
              vectors + 4 * tasks,
              vectors + 5 * tasks,
              1 / method.alpha,
              method.max_iters};
  double* norms = p.norms;
  const double start = (1 - method.alpha) / (1 + method.alpha);
  for_each(group, tasks, [&](int64_t i) {
    const double squared = gram[i * tasks + i];
    norms[i] = squared > 0 ? sqrt(squared) : 1.0;
    p.y[i] = pow(norms[i], start);  // the solution for orthogonal task gradients
  });
  group.sync();
  for_each(group, square, [&](int64_t k) {
    const int64_t i = k / tasks, j = k % tasks;
    p.cosines[k] = i == j ? 1 + kRidge : gram[k] / norms[i] / norms[j];
  });
  group.sync();
  newton(group, p, tasks);
  const double much = sum_of(group, tasks, [&](int64_t i) { return kRidge * p.y[i] < 0.01 * p.shares[i] ? 0.0 : 1.0; });
  if (much == 0) {
    for_each(group, tasks, [&](int64_t i) { p.cosines[i * tasks + i] = 1; });
    group.sync();
    newton(group, p, tasks);
  }
  const double broken = sum_of(group, tasks, [&](int64_t i) { return is_finite(p.residual[i]) ? 0.0 : 1.0; });
  for_each(group, tasks, [&](int64_t i) {
    const double weight = gram[i * tasks + i] > 0 ? p.y[i] / norms[i] : 0.0;
    weights[i] = broken == 0 ? weight : __builtin_nan("");
  });
}

}  // namespace fpg
