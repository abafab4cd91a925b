// PCGrad: each task gradient is projected, one after the other, off those that it conflicts with (Yu et al. 2020,
// arXiv:2001.06782). A row of C is a problem of its own.
#pragma once

#include "group.h"

namespace fpg {

struct Projection {
  bool self_projection;
  double eps;
  double min_squared_norm;
};

struct SolveJob {
  const double* gram;    // [problems, T, T]
  const int64_t* order;  // [T, T], or [problems, T, T] when order_per_problem
  bool order_per_problem;
  Projection projection;
  int64_t tasks;
  int64_t problems;
  double* coefficients;  // [problems, T, T]
  double* weights;       // [problems, T]: scale * column sums; null: none
  double scale;
};

// Negative and finite. False for NaN: a dot product that is not finite takes no part.
FPG_HOST_DEVICE bool conflicts(double dot) { return dot < 0 && dot >= -1.7976931348623157e308; }

FPG_HOST_DEVICE bool usable(double squared_norm, double min_squared_norm) {
  return squared_norm > min_squared_norm && squared_norm <= 1.7976931348623157e308;
}

// Row i of C, of the problem with this `gram`; order[0] to order[T - 1] are the row's. dots [T] holds v = C_i G
// throughout: v_j is the test g_i' . g_j, and a projection on task j adds c G[j, :]. With hundreds of tasks a lane of a
// GPU has several elements: the loops are not for_each.
template <class Group, class Order>
FPG_HOST_DEVICE void project_row(const Group& group, const double* gram, const Order& order, int64_t tasks, int64_t i,
                                 Projection projection, double* coefficients, double* dots) {
  for (int64_t k = group.lane; k < tasks; k += group.lanes) {
    coefficients[k] = k == i ? 1.0 : 0.0;
    dots[k] = gram[i * tasks + k];
  }
  group.sync();
  for (int64_t place = 0; place < tasks; ++place) {
    const int64_t j = order[place];
    if (j < 0 || j >= tasks) {
      for (int64_t k = group.lane; k < tasks; k += group.lanes) coefficients[k] = __builtin_nan("");
      return;
    }
    if (j == i && !projection.self_projection) continue;
    const double squared_norm = gram[j * tasks + j];
    const double dot = dots[j];
    if (!conflicts(dot) || !usable(squared_norm, projection.min_squared_norm)) continue;
    const double step = -dot / (squared_norm + projection.eps);
    group.sync();
    if (group.lane == 0) coefficients[j] += step;
    FPG_FOUR_STEPS
    for (int64_t k = group.lane; k < tasks; k += group.lanes) dots[k] += step * gram[j * tasks + k];
    group.sync();
  }
}

// Weight of task k in scale * (sum of the projected rows): the column sum of C, added in the order of the rows.
FPG_HOST_DEVICE double merged_weight(const double* coefficients, int64_t tasks, int64_t k, double scale) {
  double sum = 0;
  for (int64_t i = 0; i < tasks; ++i) sum += coefficients[i * tasks + k];
  return scale * sum;
}

}  // namespace fpg
