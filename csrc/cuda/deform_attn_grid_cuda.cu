// The fused form on CUDA: deform_attn_grid and its backward.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "cuda/launch.cuh"

namespace piip::cuda {
namespace {

// Calls f with a null pointer to the element type of sampling, which is that of value or its accumulation type, and
// whether the kernels for usual cases serve it.
template <typename T, typename F>
void dispatch_sampling(ScalarType value, ScalarType sampling, const F& f) {
  if (sampling == value) {
    f(static_cast<T*>(nullptr), true);
  } else {
    f(static_cast<typename Accumulate<T>::type*>(nullptr), false);
  }
}

template <typename T, typename S>
auto make_source(const Tensor& sampling, const Tensor* grad_sampling, const std::vector<int64_t>& query_shape) {
  return GridOffsets<typename Accumulate<T>::type, S>{
      static_cast<const S*>(sampling.const_data_ptr()),
      grad_sampling == nullptr ? nullptr : static_cast<S*>(grad_sampling->mutable_data_ptr()),
      static_cast<int32_t>(query_shape[0]), static_cast<int32_t>(query_shape[1])};
}

// Sampling in a dtype that the kernels take beside values of dtype `value`: the same, or float32 (float64).
Tensor usable_sampling(const Tensor& sampling, ScalarType value) {
  const ScalarType dtype = sampling.scalar_type();
  const ScalarType computed = value == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (dtype == value || dtype == computed) {
    return torch::stable::contiguous(sampling);
  }
  Tensor converted = torch::stable::new_empty(sampling, sampling.sizes(), computed);
  torch::stable::copy_(converted, sampling);
  return converted;
}

Tensor forward(
    const Tensor& value_,
    const std::vector<int64_t>& value_shapes,
    const std::vector<int64_t>& query_shape,
    const Tensor& sampling_,
    int64_t points) {
  const Sizes s = check_grid(value_, value_shapes, query_shape, sampling_, points);
  check_same_device(value_, sampling_);
  const torch::stable::accelerator::DeviceGuard guard(value_.get_device_index());
  const Tensor value = torch::stable::contiguous(value_), sampling = usable_sampling(sampling_, value.scalar_type());
  Tensor output = torch::stable::new_empty(value, {s.batch, s.queries, s.heads * s.width});
  if (output.numel() > 0) {
    const Levels levels = make_levels(value_shapes);
    dispatch_type(value.scalar_type(), [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      dispatch_sampling<T>(value.scalar_type(), sampling.scalar_type(), [&](auto* sampling_type, bool usual) {
        using S = std::remove_pointer_t<decltype(sampling_type)>;
        run_forward<T>(usual, s, levels, make_source<T, S>(sampling, nullptr, query_shape), value, output);
      });
    });
  }
  return output;
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& grad_output_,
    const Tensor& value_,
    const std::vector<int64_t>& value_shapes,
    const std::vector<int64_t>& query_shape,
    const Tensor& sampling_,
    int64_t points,
    bool deterministic) {
  const Sizes s = check_grid(value_, value_shapes, query_shape, sampling_, points);
  check_grad_output(grad_output_, value_, s);
  check_same_device(value_, grad_output_);
  check_same_device(value_, sampling_);
  const torch::stable::accelerator::DeviceGuard guard(value_.get_device_index());
  const Tensor value = torch::stable::contiguous(value_), grad_output = torch::stable::contiguous(grad_output_),
               sampling = usable_sampling(sampling_, value.scalar_type());
  if (s.batch * s.queries * s.heads == 0) {
    return {
        torch::stable::new_zeros(value, value.sizes()), torch::stable::new_zeros(sampling_, sampling_.sizes())};
  }
  const Levels levels = make_levels(value_shapes);
  Tensor grad_value, grad_sampling = torch::stable::new_empty(sampling, sampling.sizes());
  dispatch_type(value.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_sampling<T>(value.scalar_type(), sampling.scalar_type(), [&](auto* sampling_type, bool usual) {
      using S = std::remove_pointer_t<decltype(sampling_type)>;
      const auto source = make_source<T, S>(sampling, &grad_sampling, query_shape);
      grad_value = run_backward<T>(usual, deterministic, s, levels, source, grad_output, value, nullptr);
    });
  });
  if (sampling.scalar_type() == sampling_.scalar_type()) {
    return {grad_value, grad_sampling};
  }
  Tensor rounded = torch::stable::new_empty(sampling_, sampling_.sizes());
  torch::stable::copy_(rounded, grad_sampling);
  return {grad_value, rounded};
}

}  // namespace
}  // namespace piip::cuda

STABLE_TORCH_LIBRARY_IMPL(piip, CUDA, m) {
  m.impl("deform_attn_grid", TORCH_BOX(&piip::cuda::forward));
  m.impl("deform_attn_grid_backward", TORCH_BOX(&piip::cuda::backward));
}
