// MGDA as published: Frank-Wolfe for the shortest convex combination of the task gradients.
#pragma once

#include "group.h"

namespace fpg {

struct FrankWolfe {
  double epsilon;  // stop where the step falls below it
  double max_iters;
};

FPG_HOST_DEVICE int64_t scratch_doubles(const FrankWolfe&, int64_t tasks) { return tasks; }

template <class Group>
FPG_HOST_DEVICE void solve(const Group& group, const FrankWolfe& method, const double* gram, int64_t tasks,
                           double* weights, double* products) {
  for_each(group, tasks, [&](int64_t i) { weights[i] = 1.0 / static_cast<double>(tasks); });
  group.sync();
  for (int64_t done = 0; static_cast<double>(done) < method.max_iters; ++done) {
    multiply(group, gram, weights, tasks, products);
    const Place task = lowest_of(group, tasks, [&](int64_t i) { return products[i]; });
    const double current = dot(group, weights, products, tasks), mixed = task.value;
    const double corner = gram[task.index * tasks + task.index];
    // The minimum of the norm between w and the corner; elsewhere than inside it lies at an end, the nearer one where
    // both are the same point, so that the search stops.
    const bool inside = mixed < corner && mixed < current;
    const double step = inside ? (current - mixed) / (current + corner - 2 * mixed) : mixed < current ? 1.0 : 0.0;
    for_each(group, tasks, [&](int64_t i) { weights[i] = weights[i] * (1 - step) + (i == task.index ? step : 0.0); });
    group.sync();
    if (step < method.epsilon) break;
  }
}

}  // namespace fpg
