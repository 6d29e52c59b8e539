// CPU side of the operator: chooses the kernels for this processor, and cuts the work for PyTorch's thread pool.
#include <cstdlib>
#include <limits>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/kernel.h"
#include "ms_deform_attn.h"

namespace piip::cpu {
namespace {

template <typename T>
struct Kernels {
  decltype(&portable::pack<T>) pack;
  decltype(&portable::forward<T>) forward;
  decltype(&portable::backward<T>) backward;
};

enum class Capability { kPortable, kAvx2, kAvx512 };

// The best this processor has; PIIP_CPU_CAPABILITY=portable or avx2 asks for less (for tests and bug reports).
Capability find_capability() {
#if defined(__x86_64__)
  const char* wish = std::getenv("PIIP_CPU_CAPABILITY");
  const std::string limit = wish ? wish : "avx512";
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && limit == "avx512") {
    return Capability::kAvx512;
  }
  if (avx2 && limit != "portable") {
    return Capability::kAvx2;
  }
#endif
  return Capability::kPortable;
}

Capability capability() {
  static const Capability found = find_capability();
  return found;
}

std::string capability_name() {
  switch (capability()) {
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

template <typename T>
Kernels<T> kernels() {
#if defined(__x86_64__)
  if (capability() == Capability::kAvx512) {
    return {&avx512::pack<T>, &avx512::forward<T>, &avx512::backward<T>};
  }
  if (capability() == Capability::kAvx2) {
    return {&avx2::pack<T>, &avx2::forward<T>, &avx2::backward<T>};
  }
#endif
  return {&portable::pack<T>, &portable::forward<T>, &portable::backward<T>};
}

// Calls f with a null pointer to the element type of the kernels for this dtype.
template <typename F>
void dispatch(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<HalfBits*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16Bits*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "ms_deform_attn: value must be float64, float32, float16 or bfloat16");
  }
}

template <typename T>
Call<T> make_call(
    const Sizes& sizes,
    const std::vector<int64_t>& spatial_shapes,
    const Tensor& value,
    const Tensor& locations,
    const Tensor& weights) {
  using A = typename Call<T>::A;
  Call<T> call{};
  call.batch = sizes.batch;
  call.values = sizes.values;
  call.heads = sizes.heads;
  call.width = sizes.width;
  call.queries = sizes.queries;
  call.levels = sizes.levels;
  call.points = sizes.points;
  call.spatial_shapes = spatial_shapes.data();
  call.value = static_cast<const T*>(value.const_data_ptr());
  call.locations = static_cast<const A*>(locations.const_data_ptr());
  call.weights = static_cast<const A*>(weights.const_data_ptr());
  return call;
}

Sizes check_cpu(
    const Tensor& value,
    const std::vector<int64_t>& spatial_shapes,
    const Tensor& locations,
    const Tensor& weights) {
  const Sizes sizes = check(value, spatial_shapes, locations, weights);
  STD_TORCH_CHECK(
      sizes.values < std::numeric_limits<int32_t>::max(), "ms_deform_attn: more than 2^31 - 2 values per image");
  return sizes;
}

// Runs f(begin, end) over [0, count) on as many threads as the work is worth: a step is about one multiply-add.
template <typename F>
void parallel(int64_t count, int64_t steps_each, const F& f) {
  constexpr int64_t kStepsPerThread = 1 << 16;
  torch::stable::parallel_for(0, count, kStepsPerThread / (steps_each + 1) + 1, f);
}

// Scratch for packed rows, of the dtype sums are kept in.
Tensor new_rows(const Sizes& s, const Tensor& locations) {
  return torch::stable::new_empty(locations, {s.batch, s.heads, s.values + 1, padded_width(s.width)});
}

int64_t steps_per_query_and_head(const Sizes& s) {
  return 4 * s.levels * s.points * padded_width(s.width);
}

Tensor forward(
    const Tensor& value_,
    const std::vector<int64_t>& spatial_shapes,
    const Tensor& locations_,
    const Tensor& weights_) {
  const Sizes s = check_cpu(value_, spatial_shapes, locations_, weights_);
  const Tensor value = torch::stable::contiguous(value_), locations = torch::stable::contiguous(locations_),
               weights = torch::stable::contiguous(weights_);
  Tensor output = torch::stable::new_empty(value, {s.batch, s.queries, s.heads * s.width});
  if (output.numel() == 0) {
    return output;
  }
  const Tensor rows = new_rows(s, locations);
  dispatch(value.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Call<T> call = make_call<T>(s, spatial_shapes, value, locations, weights);
    call.output = static_cast<T*>(output.mutable_data_ptr());
    call.rows = static_cast<typename Call<T>::A*>(rows.mutable_data_ptr());
    const Kernels<T> run = kernels<T>();
    parallel(s.batch * (s.values + 1), s.heads * s.width, [&](int64_t begin, int64_t end) {
      run.pack(call, begin, end);
    });
    parallel(s.batch * s.queries, s.heads * steps_per_query_and_head(s), [&](int64_t begin, int64_t end) {
      run.forward(call, begin, end);
    });
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output_,
    const Tensor& value_,
    const std::vector<int64_t>& spatial_shapes,
    const Tensor& locations_,
    const Tensor& weights_) {
  const Sizes s = check_cpu(value_, spatial_shapes, locations_, weights_);
  check_grad_output(grad_output_, value_, s);
  const Tensor value = torch::stable::contiguous(value_), locations = torch::stable::contiguous(locations_),
               weights = torch::stable::contiguous(weights_), grad_output = torch::stable::contiguous(grad_output_);
  Tensor grad_value = torch::stable::new_empty(value, value.sizes());
  Tensor grad_locations = torch::stable::new_empty(locations, locations.sizes());
  Tensor grad_weights = torch::stable::new_empty(weights, weights.sizes());
  if (s.batch * s.heads == 0) {
    return {grad_value, grad_locations, grad_weights};
  }
  const Tensor rows = new_rows(s, locations), grad_rows = new_rows(s, locations);
  dispatch(value.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename Call<T>::A;
    Call<T> call = make_call<T>(s, spatial_shapes, value, locations, weights);
    call.grad_output = static_cast<const T*>(grad_output.const_data_ptr());
    call.grad_value = static_cast<T*>(grad_value.mutable_data_ptr());
    call.grad_locations = static_cast<A*>(grad_locations.mutable_data_ptr());
    call.grad_weights = static_cast<A*>(grad_weights.mutable_data_ptr());
    call.rows = static_cast<A*>(rows.mutable_data_ptr());
    call.grad_rows = static_cast<A*>(grad_rows.mutable_data_ptr());
    const Kernels<T> run = kernels<T>();
    parallel(s.batch * (s.values + 1), s.heads * s.width, [&](int64_t begin, int64_t end) {
      run.pack(call, begin, end);
    });
    parallel(s.batch * s.heads, 3 * s.queries * steps_per_query_and_head(s), [&](int64_t begin, int64_t end) {
      run.backward(call, begin, end);
    });
  });
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace
}  // namespace piip::cpu

STABLE_TORCH_LIBRARY_IMPL(piip, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&piip::cpu::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&piip::cpu::backward));
}

STABLE_TORCH_LIBRARY_IMPL(piip, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&piip::cpu::capability_name));
}
