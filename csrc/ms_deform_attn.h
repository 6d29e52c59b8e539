// What the CPU and the CUDA side share: the sizes of a call, read once from its tensors and checked.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace piip {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Sizes {
  int64_t batch;
  int64_t values;  // S, all levels together
  int64_t heads;
  int64_t width;  // D, channels per head
  int64_t queries;
  int64_t levels;
  int64_t points;
};

// The public function in Python explains what is wrong; this keeps direct callers of the operator from reading
// outside the tensors.
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
  STD_TORCH_CHECK(
      static_cast<int64_t>(spatial_shapes.size()) == 2 * sizes.levels,
      "ms_deform_attn: spatial_shapes must hold H and W of ", sizes.levels, " levels, got ", spatial_shapes.size(),
      " numbers");
  int64_t covered = 0;
  for (int64_t level = 0; level < sizes.levels; ++level) {
    const int64_t height = spatial_shapes[2 * level], width = spatial_shapes[2 * level + 1];
    STD_TORCH_CHECK(height >= 0 && width >= 0, "ms_deform_attn: negative size in spatial_shapes");
    covered += height * width;
  }
  STD_TORCH_CHECK(
      covered == sizes.values, "ms_deform_attn: spatial_shapes cover ", covered, " rows, value has ", sizes.values);
  const ScalarType computed = value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      locations.scalar_type() == computed && weights.scalar_type() == computed,
      "ms_deform_attn: sampling_locations and attention_weights must be float32, or float64 with float64 values");
  return sizes;
}

inline void check_grad_output(const Tensor& grad_output, const Tensor& value, const Sizes& sizes) {
  STD_TORCH_CHECK(
      grad_output.dim() == 3 && grad_output.size(0) == sizes.batch && grad_output.size(1) == sizes.queries &&
          grad_output.size(2) == sizes.heads * sizes.width && grad_output.scalar_type() == value.scalar_type(),
      "ms_deform_attn_backward: grad_output must have the shape (B, Q, M * D) and dtype of the output");
}

}  // namespace piip
