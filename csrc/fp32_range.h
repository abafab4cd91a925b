// What fp32 can be trusted with; beyond it the kernels take float64.
#pragma once

#include "host_device.h"

namespace fpg {

// Squared row norms in this range leave fp32 products and their sums exact enough: below it, products of fp32 elements
// may underflow by more than 2^-24 of the sum (for up to 2^46 columns); above it, a lane may overflow.
constexpr double kSafeSquaredNormMin = 0x1p-80;
constexpr double kSafeSquaredNormMax = 0x1p120;

// False for NaN: it may be the difference of two products that overflowed.
FPG_HOST_DEVICE bool safe_squared_norm(double squared_norm) {
  return squared_norm >= kSafeSquaredNormMin && squared_norm <= kSafeSquaredNormMax;
}

// Weights in this range keep their meaning when rounded to fp32 and multiplied with fp32 elements.
constexpr double kSafeWeightMin = 0x1p-100;
constexpr double kSafeWeightMax = 0x1p100;

// False for NaN, which fp32 keeps.
FPG_HOST_DEVICE bool unsafe_weight(double weight) {
  const double magnitude = weight < 0 ? -weight : weight;
  return magnitude > kSafeWeightMax || (magnitude < kSafeWeightMin && magnitude != 0);
}

}  // namespace fpg
