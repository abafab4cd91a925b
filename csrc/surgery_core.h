// The T x T solve: PCGrad's sequential projections on a Gram matrix. Shared by the CPU and the CUDA library.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fpg {

struct Projection {
  bool self_projection;
  double eps;
  double min_squared_norm;
};

// Negative and finite. False for NaN: a dot product that is not finite takes no part.
FPG_HOST_DEVICE bool conflicts(double dot) { return dot < 0 && dot >= -1.7976931348623157e308; }

FPG_HOST_DEVICE bool usable(double squared_norm, double min_squared_norm) {
  return squared_norm > min_squared_norm && squared_norm <= 1.7976931348623157e308;
}

// Row i of C by one group of `lanes` threads, of which the caller is `lane`; `sync` makes the group's writes to `dots`
// visible to it. A single thread passes 0, 1 and an empty sync.
//
// dots [T] holds v = C_i G throughout: v_j is the test g_i' . g_j, and a projection on task j adds c G[j, :].
template <class Sync>
FPG_HOST_DEVICE void project_row(const double* gram, const int64_t* order, int64_t tasks, int64_t i,
                                 Projection projection, double* coefficients, double* dots, int lane, int lanes,
                                 Sync sync) {
  for (int64_t k = lane; k < tasks; k += lanes) {
    coefficients[k] = k == i ? 1.0 : 0.0;
    dots[k] = gram[i * tasks + k];
  }
  sync();
  for (int64_t place = 0; place < tasks; ++place) {
    const int64_t j = order[place];
    if (j < 0 || j >= tasks) {
      for (int64_t k = lane; k < tasks; k += lanes) coefficients[k] = __builtin_nan("");
      return;
    }
    if (j == i && !projection.self_projection) continue;
    const double squared_norm = gram[j * tasks + j];
    const double dot = dots[j];
    if (!conflicts(dot) || !usable(squared_norm, projection.min_squared_norm)) continue;
    const double step = -dot / (squared_norm + projection.eps);
    sync();
    for (int64_t k = lane; k < tasks; k += lanes) {
      dots[k] += step * gram[j * tasks + k];
      if (k == j) coefficients[k] += step;
    }
    sync();
  }
}

// Weight of task k in scale * (sum of the projected rows): the column sum of C, added in the order of the rows.
FPG_HOST_DEVICE double merged_weight(const double* coefficients, int64_t tasks, int64_t k, double scale) {
  double sum = 0;
  for (int64_t i = 0; i < tasks; ++i) sum += coefficients[i * tasks + k];
  return scale * sum;
}

}  // namespace fpg
