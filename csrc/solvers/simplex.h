// The minimum of slopes . w + factor |w|_G over the simplex, exactly, by going from face to face (Wolfe 1976); and what
// MGDA and CAGrad make of it. |w|_G stands for sqrt(w' G w + kSmoothing^2): without a kink at zero every face that can
// go down shows it.
#pragma once

#include "group.h"

namespace fpg {

constexpr double kSmoothing = 1e-9;
constexpr double kNoLower =
    1e-13;  // a corner lies lower than the face only by more than this part of the largest slope

struct Simplex {
  const double* gram;  // [T, T], trace 1 when multiplied with `scale`
  double scale;
  int64_t tasks;
  double factor;
  double* slopes;  // [T]
  double* w;       // [T]
  double* best;    // [T]
  double* products;
  double* direction;
  double* lengths;
  double* system;  // [T + 1, T + 3]
  int64_t* face;   // [T + 1]: the corners in the order in which they joined
};

FPG_HOST_DEVICE int64_t simplex_doubles(int64_t tasks) { return 6 * tasks + (tasks + 1) * (tasks + 3) + tasks + 1; }

FPG_HOST_DEVICE Simplex simplex(const double* gram, double scale, int64_t tasks, double factor, double* scratch) {
  Simplex problem = {gram,
                     scale,
                     tasks,
                     factor,
                     scratch,
                     scratch + tasks,
                     scratch + 2 * tasks,
                     scratch + 3 * tasks,
                     scratch + 4 * tasks,
                     scratch + 5 * tasks,
                     scratch + 6 * tasks,
                     nullptr};
  problem.face = reinterpret_cast<int64_t*>(problem.system + (tasks + 1) * (tasks + 3));
  return problem;
}

FPG_HOST_DEVICE double smooth_norm(double squared) {
  return sqrt((squared > 0 ? squared : 0.0) + kSmoothing * kSmoothing);
}

// v' G v over the face for v in one of the last two columns of the system.
template <class Group>
FPG_HOST_DEVICE double squared_on_face(const Group& group, const Simplex& p, int64_t count, int64_t column) {
  const int64_t width = count + 3;
  return sum_of(group, count, [&](int64_t i) {
    double product = 0;
    for (int64_t j = 0; j < count; ++j) {
      product += p.gram[p.face[i] * p.tasks + p.face[j]] * p.system[j * width + column];
    }
    return p.scale * product * p.system[i * width + column];
  });
}

// w to the minimum over the face of `count` corners, or over what is left of it; the corners left, 0 where the last one
// lies in the affine hull of the others.
template <class Group>
FPG_HOST_DEVICE int64_t descend(const Group& group, const Simplex& p, int64_t count) {
  while (true) {
    const int64_t n = count + 1, width = n + 2;
    for_each(group, n * width, [&](int64_t k) {
      const int64_t i = k / width, j = k % width;
      double value = j == count || i == count ? 1.0 : 0.0;
      if (i < count && j < count) value = p.scale * p.gram[p.face[i] * p.tasks + p.face[j]];
      if (i == count && j == count) value = 0.0;
      if (j == n) value = i == count ? 1.0 : 0.0;
      if (j == n + 1) value = i == count ? 0.0 : -p.slopes[p.face[i]];
      p.system[k] = value;
    });
    group.sync();
    if (!solve_linear(group, p.system, n, 2)) return 0;
    // In the affine hull u has the least norm, and the minimum is u + (norm / factor) v with sum u = 1, sum v = 0.
    const double steepness = p.factor * p.factor - squared_on_face(group, p, count, n + 1);
    double along = 0, reach = kInfinity;  // it falls for ever along v
    if (steepness > 0) {
      const double least = squared_on_face(group, p, count, n);
      along = sqrt(((least > 0 ? least : 0.0) + kSmoothing * kSmoothing) / steepness);
      reach = 1.0;
    }
    for_each(group, count, [&](int64_t i) {
      const double u = p.system[i * width + n], v = p.system[i * width + n + 1], weight = p.w[p.face[i]];
      p.direction[i] = steepness > 0 ? u + along * v - weight : v;
      p.lengths[i] = p.direction[i] < 0 ? -weight / p.direction[i] : kInfinity;
    });
    group.sync();
    const Place first = lowest_of(group, count, [&](int64_t i) { return p.lengths[i]; });
    const double step = first.value < reach ? first.value : reach;
    const bool stays_inside = first.value >= reach || count == 1;
    for_each(group, count, [&](int64_t i) {
      double& weight = p.w[p.face[i]];
      weight += step * p.direction[i];
      if (!stays_inside && (i == first.index || !(weight > 0))) weight = 0;
    });
    group.sync();
    if (stays_inside) return count;
    int64_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t corner = p.face[i];
      group.sync();  // all have read it before one of them writes
      if (p.w[corner] > 0) {
        if (group.lane == 0) p.face[left] = corner;
        ++left;
      }
    }
    group.sync();
    count = left;
    if (count == 0) return 0;
  }
}

// The minimiser into `best`.
template <class Group>
FPG_HOST_DEVICE void minimise(const Group& group, const Simplex& p) {
  const int64_t tasks = p.tasks;
  const Place start = lowest_of(
      group, tasks, [&](int64_t i) { return p.slopes[i] + p.factor * sqrt(p.scale * p.gram[i * tasks + i]); });
  for_each(group, tasks, [&](int64_t i) { p.w[i] = p.best[i] = i == start.index ? 1.0 : 0.0; });
  if (group.lane == 0) p.face[0] = start.index;
  group.sync();
  int64_t count = 1;
  double lowest = kInfinity;
  for (int64_t round = 0; round < 20 * tasks; ++round) {  // each ends lower, on another face; about T suffice
    multiply(group, p.gram, p.w, tasks, p.products);
    const double norm = smooth_norm(p.scale * dot(group, p.w, p.products, tasks));
    const double height = dot(group, p.slopes, p.w, tasks) + p.factor * norm;
    if (!(height < lowest)) break;  // nothing but rounding is left
    lowest = height;
    const double steep = p.factor / norm * p.scale;
    for_each(group, tasks, [&](int64_t i) {
      p.best[i] = p.w[i];
      p.products[i] = p.slopes[i] + steep * p.products[i];
    });
    group.sync();
    const Place corner = lowest_of(group, tasks, [&](int64_t i) { return p.products[i]; });
    const double level = dot(group, p.products, p.w, tasks);
    const double largest = highest_of(group, tasks, [&](int64_t i) { return std::fabs(p.products[i]); });
    const double known = sum_of(group, count, [&](int64_t i) { return p.face[i] == corner.index ? 1.0 : 0.0; });
    if (corner.value >= level - kNoLower * largest || known > 0) break;
    if (group.lane == 0) p.face[count] = corner.index;
    group.sync();
    count = descend(group, p, count + 1);
    if (count == 0) break;
  }
}

template <class Group>
FPG_HOST_DEVICE double inverse_trace(const Group& group, const double* gram, int64_t tasks) {
  const double trace = sum_of(group, tasks, [&](int64_t i) { return gram[i * tasks + i]; });
  // The inverse of a trace near the smallest number would be infinite; there another trace than 1 does.
  return trace != 0 ? 1 / (trace > 0x1p-1020 ? trace : 0x1p-1020) : 1.0;
}

struct ShortestPoint {};

FPG_HOST_DEVICE int64_t scratch_doubles(const ShortestPoint&, int64_t tasks) { return simplex_doubles(tasks); }

template <class Group>
FPG_HOST_DEVICE void solve(const Group& group, const ShortestPoint&, const double* gram, int64_t tasks, double* weights,
                           double* scratch) {
  const Simplex problem = simplex(gram, inverse_trace(group, gram, tasks), tasks, 1.0, scratch);
  for_each(group, tasks, [&](int64_t i) { problem.slopes[i] = 0; });
  group.sync();
  minimise(group, problem);
  for_each(group, tasks, [&](int64_t i) { weights[i] = problem.best[i]; });
}

struct ConflictAverse {
  double c;
  double norm_eps;
};

FPG_HOST_DEVICE int64_t scratch_doubles(const ConflictAverse&, int64_t tasks) { return simplex_doubles(tasks); }

template <class Group>
FPG_HOST_DEVICE void solve(const Group& group, const ConflictAverse& method, const double* gram, int64_t tasks,
                           double* weights, double* scratch) {
  const double mean = 1.0 / static_cast<double>(tasks);
  Simplex problem = simplex(gram, inverse_trace(group, gram, tasks), tasks, 0.0, scratch);
  for_each(group, tasks, [&](int64_t i) {  // g_i . g_0
    double sum = 0;
    for (int64_t j = 0; j < tasks; ++j) sum += gram[j * tasks + i];
    problem.slopes[i] = problem.scale * mean * sum;
  });
  group.sync();
  const double squared = mean * sum_of(group, tasks, [&](int64_t i) { return problem.slopes[i]; });
  problem.factor = method.c * sqrt(squared > 0 ? squared : 0.0);
  double share = 0, rest = method.c == 0 ? mean : 0.0;
  if (problem.factor > 0) {
    minimise(group, problem);
    multiply(group, gram, problem.best, tasks, problem.products);
    const double v = problem.scale * dot(group, problem.best, problem.products, tasks);
    const double norm = sqrt(v > 0 ? v : 0.0);
    const double least = method.norm_eps > kSmoothing ? method.norm_eps : kSmoothing;
    if (!(norm < least)) {
      share = problem.factor / norm;
      rest = mean;
    }
  }
  for_each(group, tasks, [&](int64_t i) { weights[i] = share == 0 ? rest : rest + share * problem.best[i]; });
}

}  // namespace fpg
