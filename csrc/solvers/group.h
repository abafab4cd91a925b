// Who solves a T x T problem together: one thread of a CPU, or a warp of a GPU (cuda/warp_group.h).
//
// All lanes of a group take the same way: what they decide on comes from `sum`, `lowest` and their like, which give the
// same bits to all. `sync` makes what they wrote visible to each other.
#pragma once

#include <cmath>
#include <cstdint>

#include "../host_device.h"

#if defined(__CUDACC__)
#define FPG_FEW_STEPS _Pragma("unroll 1")  // a lane has one element or two: unrolled, they take registers for nothing
#else
#define FPG_FEW_STEPS
#endif

namespace fpg {

struct OneThread {
  static constexpr int lane = 0, lanes = 1;
  FPG_HOST_DEVICE void sync() const {}
  FPG_HOST_DEVICE double sum(double mine) const { return mine; }
  FPG_HOST_DEVICE double highest(double mine) const { return mine; }
  FPG_HOST_DEVICE void lowest(double*, int64_t*) const {}
};

constexpr double kInfinity = __builtin_inf();
constexpr double kEps = 0x1p-52;

FPG_HOST_DEVICE bool is_finite(double value) { return value - value == 0; }

// Σ f(i) over i < n.
template <class Group, class F>
FPG_HOST_DEVICE double sum_of(const Group& group, int64_t n, F f) {
  double sum = 0;
  FPG_FEW_STEPS
  for (int64_t i = group.lane; i < n; i += group.lanes) sum += f(i);
  return group.sum(sum);
}

// max f(i) over i < n, at least 0.
template <class Group, class F>
FPG_HOST_DEVICE double highest_of(const Group& group, int64_t n, F f) {
  double highest = 0;
  FPG_FEW_STEPS
  for (int64_t i = group.lane; i < n; i += group.lanes) {
    const double value = f(i);
    if (value > highest) highest = value;
  }
  return group.highest(highest);
}

struct Place {
  double value;
  int64_t index;
};

// The first of the smallest f(i) over i < n, n > 0. Not a number counts as -inf: no lane may see another order.
template <class Group, class F>
FPG_HOST_DEVICE Place lowest_of(const Group& group, int64_t n, F f) {
  Place found = {kInfinity, n};
  FPG_FEW_STEPS
  for (int64_t i = group.lane; i < n; i += group.lanes) {
    const double given = f(i), value = given == given ? given : -kInfinity;
    if (value < found.value || found.index == n) found = {value, i};
  }
  group.lowest(&found.value, &found.index);
  return found;
}

template <class Group, class F>
FPG_HOST_DEVICE void for_each(const Group& group, int64_t n, F f) {
  FPG_FEW_STEPS
  for (int64_t i = group.lane; i < n; i += group.lanes) f(i);
}

// to += factor from; the two are apart.
template <class Group>
FPG_HOST_DEVICE void add_scaled(const Group& group, int64_t n, double factor, const double* __restrict__ from,
                                double* __restrict__ to) {
  for_each(group, n, [=](int64_t i) { to[i] += factor * from[i]; });
}

// to = M v for a symmetric M [n, n]: a lane walks down a column, so that lanes read side by side.
template <class Group>
FPG_HOST_DEVICE void multiply(const Group& group, const double* matrix, const double* vector, int64_t n, double* to) {
  for_each(group, n, [&](int64_t i) { to[i] = 0; });
  for (int64_t j = 0; j < n; ++j) add_scaled(group, n, vector[j], matrix + j * n, to);
  group.sync();
}

template <class Group>
FPG_HOST_DEVICE double dot(const Group& group, const double* a, const double* b, int64_t n) {
  return sum_of(group, n, [&](int64_t i) { return a[i] * b[i]; });
}

// Whether all of G [n, n] is finite.
template <class Group>
FPG_HOST_DEVICE bool all_finite(const Group& group, const double* gram, int64_t n) {
  return sum_of(group, n * n, [&](int64_t k) { return is_finite(gram[k]) ? 0.0 : 1.0; }) == 0;
}

// Solves A X = B by Gauss and Jordan with row pivots. system [n, n + m] holds A and B; X takes the place of B.
// False where A is singular to the last bit, or not finite.
template <class Group>
FPG_HOST_DEVICE bool solve_linear(const Group& group, double* system, int64_t n, int64_t m) {
  const int64_t width = n + m;
  for (int64_t k = 0; k < n; ++k) {
    const Place pivot = lowest_of(group, n - k, [&](int64_t i) { return -std::fabs(system[(k + i) * width + k]); });
    if (!(pivot.value < 0 && pivot.value > -kInfinity)) return false;
    double* row = system + k * width;
    if (pivot.index > 0) {
      double* other = row + pivot.index * width;
      for_each(group, width, [&](int64_t c) {
        const double held = row[c];
        row[c] = other[c];
        other[c] = held;
      });
      group.sync();
    }
    for (int64_t i = 0; i < n; ++i) {
      if (i == k) continue;
      double* reduced = system + i * width;
      add_scaled(group, width - k - 1, -reduced[k] / row[k], row + k + 1, reduced + k + 1);
    }
    group.sync();
  }
  for_each(group, n * m, [&](int64_t k) { system[k / m * width + n + k % m] /= system[k / m * width + k / m]; });
  group.sync();
  return true;
}

}  // namespace fpg
