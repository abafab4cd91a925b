// Eigenvalues and eigenvectors of a Gram matrix by Jacobi's rotations, and the methods that need a (pseudo)inverse:
// Aligned-MTL, IMTL-G, ConFIG.
#pragma once

#include "group.h"

namespace fpg {

struct Spectrum {
  double* matrix;   // [T, T]: the eigenvalues end up on the diagonal
  double* vectors;  // [T, T]: an eigenvector a row
  int64_t tasks;

  FPG_HOST_DEVICE double value(int64_t i) const { return matrix[i * tasks + i]; }
};

FPG_HOST_DEVICE int64_t spectrum_doubles(int64_t tasks) { return 2 * tasks * tasks; }

// The largest element of the diagonal.
template <class Group>
FPG_HOST_DEVICE double largest_value(const Group& group, const Spectrum& p) {
  return highest_of(group, p.tasks, [&](int64_t i) { return p.value(i); });
}

// Rows and columns i and j turned so that the element at (i, j) vanishes.
template <class Group>
FPG_HOST_DEVICE void rotate(const Group& group, const Spectrum& p, int64_t i, int64_t j) {
  const int64_t tasks = p.tasks;
  double *a = p.matrix + i * tasks, *b = p.matrix + j * tasks;
  const double between = a[j];
  const double ratio = (b[j] - a[i]) / (2 * between);
  const double tangent = (ratio < 0 ? -1.0 : 1.0) / (std::fabs(ratio) + sqrt(ratio * ratio + 1));
  const double cosine = 1 / sqrt(tangent * tangent + 1), sine = tangent * cosine;
  const double first = a[i] - tangent * between, second = b[j] + tangent * between;
  group.sync();
  for_each(group, tasks, [=](int64_t k) {
    const double x = a[k], y = b[k];
    a[k] = cosine * x - sine * y;
    b[k] = sine * x + cosine * y;
  });
  double *v = p.vectors + i * tasks, *w = p.vectors + j * tasks;
  for_each(group, tasks, [=](int64_t k) {
    const double x = v[k], y = w[k];
    v[k] = cosine * x - sine * y;
    w[k] = sine * x + cosine * y;
  });
  group.sync();
  if (group.lane == 0) {
    a[i] = first;
    b[j] = second;
    a[j] = b[i] = 0;
  }
  group.sync();
  for_each(group, tasks, [&](int64_t k) {
    p.matrix[k * tasks + i] = a[k];
    p.matrix[k * tasks + j] = b[k];
  });
  group.sync();
}

// Of the matrix whose elements, row by row, are element(k).
template <class Group, class F>
FPG_HOST_DEVICE Spectrum decompose(const Group& group, int64_t tasks, double* scratch, F element) {
  const Spectrum p = {scratch, scratch + tasks * tasks, tasks};
  for_each(group, tasks * tasks, [&](int64_t k) {
    p.matrix[k] = element(k);
    p.vectors[k] = k / tasks == k % tasks ? 1.0 : 0.0;
  });
  group.sync();
  // All that is left beside the diagonal is far below the last place of the largest eigenvalue.
  const double nothing = largest_value(group, p) * 0x1p-60;
  bool turned = true;
  for (int round = 0; turned && round < 40; ++round) {  // six to ten suffice
    turned = false;
    for (int64_t i = 0; i < tasks; ++i) {
      for (int64_t j = i + 1; j < tasks; ++j) {
        if (std::fabs(p.matrix[i * tasks + j]) <= nothing) continue;
        turned = true;
        rotate(group, p, i, j);
      }
    }
  }
  return p;
}

// Up to here an eigenvalue is rounding, of numbers with this eps.
template <class Group>
FPG_HOST_DEVICE double rounding_of(const Group& group, const Spectrum& p, double eps = kEps) {
  return largest_value(group, p) * (static_cast<double>(p.tasks) * eps);
}

// Σ_t V_it x(t): the coordinate of x along eigenvector i.
template <class F>
FPG_HOST_DEVICE double along(const Spectrum& p, int64_t i, F x) {
  double sum = 0;
  for (int64_t t = 0; t < p.tasks; ++t) sum += p.vectors[i * p.tasks + t] * x(t);
  return sum;
}

// Entry t of the vector with these coordinates.
FPG_HOST_DEVICE double combined(const Spectrum& p, const double* coordinates, int64_t t) {
  double sum = 0;
  for (int64_t i = 0; i < p.tasks; ++i) sum += p.vectors[i * p.tasks + t] * coordinates[i];
  return sum;
}

enum class Scale { kMin = 0, kMedian = 1, kMeanSquare = 2 };

struct Aligned {
  double scale;  // a Scale
  double eps;    // of which eigenvalues are rounding
};

FPG_HOST_DEVICE int64_t scratch_doubles(const Aligned&, int64_t tasks) { return spectrum_doubles(tasks) + tasks; }

template <class Group, class Preferred>
FPG_HOST_DEVICE void align(const Group& group, const Aligned& method, const double* gram, int64_t tasks,
                           Preferred preferred_of, double* weights, double* scratch) {
  const Spectrum p = decompose(group, tasks, scratch, [&](int64_t k) { return gram[k]; });
  double* coordinates = scratch + spectrum_doubles(tasks);
  const double least = rounding_of(group, p, method.eps);
  const auto is_kept = [&](int64_t i) { return p.value(i) > least; };
  const double rank = sum_of(group, tasks, [&](int64_t i) { return is_kept(i) ? 1.0 : 0.0; });
  if (rank == 0) {
    for_each(group, tasks, [&](int64_t t) { weights[t] = preferred_of(t); });
    return;
  }
  const Scale scale = static_cast<Scale>(static_cast<int>(method.scale));
  double squared = 0;
  if (scale == Scale::kMeanSquare) {
    squared = sum_of(group, tasks, [&](int64_t i) { return is_kept(i) ? p.value(i) : 0.0; }) / rank;
  } else {
    const int64_t place = scale == Scale::kMedian ? (static_cast<int64_t>(rank) - 1) / 2 : 0;  // the lower one
    squared = sum_of(group, tasks, [&](int64_t i) {
      int64_t before = 0;
      for (int64_t j = 0; j < tasks; ++j) {
        const bool smaller = p.value(j) < p.value(i) || (p.value(j) == p.value(i) && j < i);
        before += is_kept(j) && smaller ? 1 : 0;
      }
      return is_kept(i) && before == place ? p.value(i) : 0.0;
    });
  }
  for_each(group, tasks, [&](int64_t i) {
    coordinates[i] = is_kept(i) ? along(p, i, preferred_of) * sqrt(squared / p.value(i)) : 0.0;
  });
  group.sync();
  for_each(group, tasks, [&](int64_t t) { weights[t] = combined(p, coordinates, t); });
}

struct Impartial {};

FPG_HOST_DEVICE int64_t scratch_doubles(const Impartial&, int64_t tasks) { return spectrum_doubles(tasks) + tasks; }

template <class Group>
FPG_HOST_DEVICE void solve(const Group& group, const Impartial&, const double* gram, int64_t tasks, double* weights,
                           double* scratch) {
  constexpr double kNoDirection = 1e-12;
  const Spectrum p = decompose(group, tasks, scratch, [&](int64_t k) { return gram[k]; });
  double* coordinates = scratch + spectrum_doubles(tasks);
  const double least = rounding_of(group, p);
  const auto norm = [&](int64_t t) { return sqrt(gram[t * tasks + t]); };
  for_each(group, tasks,
           [&](int64_t i) { coordinates[i] = p.value(i) > least ? along(p, i, norm) / p.value(i) : 0.0; });
  group.sync();
  for_each(group, tasks, [&](int64_t t) { weights[t] = combined(p, coordinates, t); });
  const double total = sum_of(group, tasks, [&](int64_t t) { return weights[t]; });
  const double trace = sum_of(group, tasks, [&](int64_t t) { return gram[t * tasks + t]; });
  const bool there = std::fabs(total) * sqrt(trace) >= kNoDirection;
  for_each(group, tasks, [&](int64_t t) { weights[t] = there ? weights[t] / total : 0.0; });
}

struct ConflictFree {};

FPG_HOST_DEVICE int64_t scratch_doubles(const ConflictFree&, int64_t tasks) {
  return spectrum_doubles(tasks) + 3 * tasks;
}

// The Gram matrix of the unit gradients; what is rounding would be blown up by a division.
template <class Group, class Preferred>
FPG_HOST_DEVICE void point_conflict_free(const Group& group, const double* gram, int64_t tasks, Preferred preferred_of,
                                         double* weights, double* scratch) {
  double *part = scratch + spectrum_doubles(tasks), *solved = part + tasks, *inverse = solved + tasks;
  for_each(group, tasks, [&](int64_t t) {
    const double norm = sqrt(gram[t * tasks + t]);
    inverse[t] = norm > 0 ? 1 / norm : 0.0;
  });
  group.sync();
  const Spectrum p =
      decompose(group, tasks, scratch, [&](int64_t k) { return gram[k] * inverse[k / tasks] * inverse[k % tasks]; });
  const double noise = 8 * static_cast<double>(tasks) * kEps;
  const double least = noise * largest_value(group, p);
  const double length = sqrt(sum_of(group, tasks, [&](int64_t t) { return preferred_of(t) * preferred_of(t); }));
  for_each(group, tasks, [&](int64_t i) {
    const double found = p.value(i) > least ? along(p, i, preferred_of) : 0.0;
    part[i] = std::fabs(found) > noise * length ? found : 0.0;
    solved[i] = part[i] != 0 ? part[i] / p.value(i) : 0.0;
  });
  group.sync();
  const double squared = dot(group, part, solved, tasks);
  // U x, and pinv(U U') p, of which x = pinv(U) p is the combination of unit gradients
  const double projected =
      sum_of(group, tasks, [&](int64_t t) { return inverse[t] > 0 ? combined(p, part, t) / inverse[t] : 0.0; });
  const double scale = squared > 0 ? projected / squared : projected;
  for_each(group, tasks, [&](int64_t t) { weights[t] = scale * combined(p, solved, t) * inverse[t]; });
}

}  // namespace fpg
