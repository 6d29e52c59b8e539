// What the CPU and the CUDA side share: the sizes of a call, read once from its tensors and checked.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "sizes.h"

namespace piip {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t product(std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (const int64_t factor : factors) {
    STD_TORCH_CHECK(
        !__builtin_mul_overflow(result, factor, &result), "deformable attention: sizes whose product exceeds 63 bits");
  }
  return result;
}

// The public functions in Python explain what is wrong; this keeps direct callers of the operators from reading
// outside the tensors.
inline void check_levels(const std::vector<int64_t>& shapes, int64_t levels, int64_t values) {
  STD_TORCH_CHECK(
      levels > 0 && static_cast<int64_t>(shapes.size()) == 2 * levels,
      "deformable attention: the shapes must hold H and W of ", levels, " levels, got ", shapes.size(), " numbers");
  constexpr int64_t kLongest = std::numeric_limits<int32_t>::max();
  int64_t covered = 0;
  for (int64_t level = 0; level < levels; ++level) {
    const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
    STD_TORCH_CHECK(
        height >= 0 && width >= 0 && height <= kLongest && width <= kLongest,
        "deformable attention: expected sizes of levels from 0 to ", kLongest, ", got ", height, " x ", width);
    const int64_t rows = height * width;
    if (rows > values - covered) {  // a sum could overflow
      covered = -1;
      break;
    }
    covered += rows;
  }
  STD_TORCH_CHECK(
      covered == values, "deformable attention: the shapes cover ", covered < 0 ? "more" : "fewer",
      " rows than the ", values, " that value has");
}

inline Sizes check(
    const Tensor& value,
    const std::vector<int64_t>& spatial_shapes,
    const Tensor& locations,
    const Tensor& weights) {
  STD_TORCH_CHECK(value.dim() == 4, "ms_deform_attn: value must have 4 dimensions (B, S, M, D), got ", value.dim());
  STD_TORCH_CHECK(
      locations.dim() == 6 && locations.size(5) == 2,
      "ms_deform_attn: sampling_locations must have 6 dimensions (B, Q, M, L, P, 2)");
  STD_TORCH_CHECK(weights.dim() == 5, "ms_deform_attn: attention_weights must have 5 dimensions (B, Q, M, L, P)");
  for (int64_t axis = 0; axis < 5; ++axis) {
    STD_TORCH_CHECK(
        weights.size(axis) == locations.size(axis),
        "ms_deform_attn: attention_weights and sampling_locations differ on axis ", axis, ": ",
        weights.size(axis), " and ", locations.size(axis));
  }
  const Sizes sizes{
      value.size(0), value.size(1), value.size(2), value.size(3),
      locations.size(1), locations.size(3), locations.size(4)};
  STD_TORCH_CHECK(
      locations.size(0) == sizes.batch && locations.size(2) == sizes.heads,
      "ms_deform_attn: value and sampling_locations differ in batch or heads");
  check_levels(spatial_shapes, sizes.levels, sizes.values);
  const ScalarType computed = value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      locations.scalar_type() == computed && weights.scalar_type() == computed,
      "ms_deform_attn: sampling_locations and attention_weights must be float32, or float64 with float64 values");
  return sizes;
}

inline Sizes check_grid(
    const Tensor& value,
    const std::vector<int64_t>& value_shapes,
    const std::vector<int64_t>& query_shape,
    const Tensor& sampling,
    int64_t points) {
  STD_TORCH_CHECK(value.dim() == 4, "deform_attn_grid: value must have 4 dimensions (B, S, M, D), got ", value.dim());
  STD_TORCH_CHECK(
      query_shape.size() == 2 && query_shape[0] >= 0 && query_shape[1] >= 0,
      "deform_attn_grid: query_shape must hold Hq and Wq");
  STD_TORCH_CHECK(points >= 0, "deform_attn_grid: num_points is negative");
  const Sizes sizes{
      value.size(0), value.size(1), value.size(2), value.size(3),
      product({query_shape[0], query_shape[1]}), static_cast<int64_t>(value_shapes.size() / 2), points};
  check_levels(value_shapes, sizes.levels, sizes.values);
  STD_TORCH_CHECK(
      sampling.dim() == 3 && sampling.size(0) == sizes.batch && sampling.size(1) == sizes.queries &&
          sampling.size(2) == product({3, sizes.heads, sizes.levels, points}),
      "deform_attn_grid: sampling must have the shape (B, Hq * Wq, 3 * M * L * P)");
  const ScalarType dtype = sampling.scalar_type();
  STD_TORCH_CHECK(
      value.scalar_type() == ScalarType::Double
          ? dtype == ScalarType::Double
          : dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
      "deform_attn_grid: sampling must be float32, float16 or bfloat16, or float64 with float64 values");
  return sizes;
}

inline void check_grad_output(const Tensor& grad_output, const Tensor& value, const Sizes& sizes) {
  STD_TORCH_CHECK(
      grad_output.dim() == 3 && grad_output.size(0) == sizes.batch && grad_output.size(1) == sizes.queries &&
          grad_output.size(2) == product({sizes.heads, sizes.width}) && grad_output.scalar_type() == value.scalar_type(),
      "deformable attention: grad_output must have the shape (B, Q, M * D) and dtype of the output");
}

}  // namespace piip
