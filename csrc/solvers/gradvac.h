// GradVac: each task gradient is turned, one after the other, towards those whose cosine with it lies below a running
// target. A row of C is a problem of its own.
#pragma once

#include "group.h"

namespace fpg {

struct GradVacJob {
  const double* gram;     // [problems, T, T]
  const int64_t* places;  // [problems, T, T]: for each row itself, then the others in the order of their turns
  int64_t tasks;
  int64_t problems;
  double beta;
  double eps;
  double* targets;       // [problems, T, T], updated; left alone where G is not finite
  double* coefficients;  // [problems, T, T], NaN where G is not finite, or where a place is none
};

FPG_HOST_DEVICE double between(double value, double low, double high) {
  return value < low ? low : value > high ? high : value;
}

// Row `row` of all; `products` [T] holds g_i' . g_k.
template <class Group>
FPG_HOST_DEVICE void vaccinate(const Group& group, const GradVacJob& job, int64_t row, double* products) {
  const int64_t tasks = job.tasks, own = row % tasks;
  const double* gram = job.gram + row / tasks * tasks * tasks;
  const int64_t* places = job.places + row * tasks;
  double *targets = job.targets + row * tasks, *coefficients = job.coefficients + row * tasks;
  const double strays =
      sum_of(group, tasks, [&](int64_t k) { return places[k] >= 0 && places[k] < tasks ? 0.0 : 1.0; });
  if (strays > 0 || !all_finite(group, gram, tasks)) {
    for_each(group, tasks, [&](int64_t k) { coefficients[k] = __builtin_nan(""); });
    return;
  }
  for_each(group, tasks, [&](int64_t k) {
    coefficients[k] = k == own ? 1.0 : 0.0;
    products[k] = gram[own * tasks + k];
  });
  group.sync();
  for (int64_t turn = 1; turn < tasks; ++turn) {
    const int64_t j = places[turn];
    const double squared = dot(group, products, coefficients, tasks), other_squared = gram[j * tasks + j];
    const double length = sqrt(squared > 0 ? squared : 0.0), other = sqrt(other_squared > 0 ? other_squared : 0.0);
    const double both = length * other + job.eps;
    const double cosine = between(products[j] / (both > 0 ? both : 1.0), -1.0, 1.0), target = targets[j];
    const double sine = sqrt(1 - cosine * cosine), target_sine = sqrt(1 - target * target);
    const double across = other * target_sine + job.eps;
    const bool turns = cosine < target && across > 0;
    const double factor = turns ? length * (target * sine - cosine * target_sine) / across : 0.0;
    group.sync();
    if (group.lane == 0) {
      coefficients[j] += factor;
      targets[j] = (1 - job.beta) * target + job.beta * cosine;
    }
    add_scaled(group, tasks, factor, gram + j * tasks, products);
    group.sync();
  }
}

}  // namespace fpg
