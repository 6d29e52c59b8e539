// The general form on CUDA: ms_deform_attn and its backward.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "cuda/launch.cuh"

namespace piip::cuda {
namespace {

Tensor forward(
    const Tensor& value_,
    const std::vector<int64_t>& spatial_shapes,
    const Tensor& locations_,
    const Tensor& weights_) {
  const Sizes s = check(value_, spatial_shapes, locations_, weights_);
  check_same_device(value_, locations_);
  check_same_device(value_, weights_);
  const torch::stable::accelerator::DeviceGuard guard(value_.get_device_index());
  const Tensor value = torch::stable::contiguous(value_), locations = torch::stable::contiguous(locations_),
               weights = torch::stable::contiguous(weights_);
  Tensor output = torch::stable::new_empty(value, {s.batch, s.queries, s.heads * s.width});
  if (output.numel() > 0) {
    const Levels levels = make_levels(spatial_shapes);
    dispatch_type(value.scalar_type(), [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      using A = typename Accumulate<T>::type;
      const Locations<A> source{
          static_cast<const A*>(locations.const_data_ptr()), static_cast<const A*>(weights.const_data_ptr()), nullptr,
          nullptr};
      run_forward<T>(true, s, levels, source, value, output);
    });
  }
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output_,
    const Tensor& value_,
    const std::vector<int64_t>& spatial_shapes,
    const Tensor& locations_,
    const Tensor& weights_,
    bool deterministic) {
  const Sizes s = check(value_, spatial_shapes, locations_, weights_);
  check_grad_output(grad_output_, value_, s);
  check_same_device(value_, grad_output_);
  check_same_device(value_, locations_);
  check_same_device(value_, weights_);
  const torch::stable::accelerator::DeviceGuard guard(value_.get_device_index());
  const Tensor value = torch::stable::contiguous(value_), locations = torch::stable::contiguous(locations_),
               weights = torch::stable::contiguous(weights_), grad_output = torch::stable::contiguous(grad_output_);
  Tensor grad_locations = torch::stable::new_empty(locations, locations.sizes());
  Tensor grad_weights = torch::stable::new_empty(weights, weights.sizes());
  if (s.batch * s.queries * s.heads == 0) {
    return {torch::stable::new_zeros(value, value.sizes()), grad_locations, grad_weights};
  }
  const Levels levels = make_levels(spatial_shapes);
  Tensor grad_value;
  dispatch_type(value.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename Accumulate<T>::type;
    const Locations<A> source{
        static_cast<const A*>(locations.const_data_ptr()), static_cast<const A*>(weights.const_data_ptr()),
        static_cast<A*>(grad_locations.mutable_data_ptr()), static_cast<A*>(grad_weights.mutable_data_ptr())};
    grad_value = run_backward<T>(true, deterministic, s, levels, source, grad_output, value, &weights);
  });
  return {grad_value, grad_locations, grad_weights};
}

int64_t cuda_version() {
  return CUDART_VERSION;
}

}  // namespace
}  // namespace piip::cuda

STABLE_TORCH_LIBRARY_IMPL(piip, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&piip::cuda::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&piip::cuda::backward));
}

STABLE_TORCH_LIBRARY_IMPL(piip, CompositeExplicitAutograd, m) {
  m.impl("cuda_version", TORCH_BOX(&piip::cuda::cuda_version));
}
