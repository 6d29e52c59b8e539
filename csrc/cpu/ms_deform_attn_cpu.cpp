// CPU side of the operators: chooses the kernels for this processor, and cuts the work for PyTorch's thread pool.
// Their schemas are defined in piip_core/ops/_library.py. Only libtorch's stable ABI is used here and in cuda/, so a
// compiled library outlives upgrades of PyTorch.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/kernel.h"
#include "ms_deform_attn.h"

namespace piip::cpu {

void* kept_memory(Block block, int64_t bytes) {
  constexpr std::align_val_t kAlign{64};
  struct Memory {
    ~Memory() {
      operator delete(data, kAlign);
    }
    void* data = nullptr;
    int64_t size = 0;
  };
  thread_local Memory memories[2];
  Memory& memory = memories[static_cast<int>(block)];
  if (memory.size < bytes) {
    operator delete(memory.data, kAlign);
    memory.data = nullptr;  // in case there is no memory
    memory.size = 0;
    memory.data = operator new(bytes, kAlign);
    memory.size = bytes;
  }
  return memory.data;
}

namespace {

template <typename T>
struct Kernels {
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

#ifndef PIIP_WITH_CUDA
int64_t no_cuda() {
  return 0;
}
#endif

template <typename T>
Kernels<T> kernels() {
#if defined(__x86_64__)
  if (capability() == Capability::kAvx512) {
    return {&avx512::forward<T>, &avx512::backward<T>};
  }
  if (capability() == Capability::kAvx2) {
    return {&avx2::forward<T>, &avx2::backward<T>};
  }
#endif
  return {&portable::forward<T>, &portable::backward<T>};
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

Type type_of(const Tensor& sampling) {
  switch (sampling.scalar_type()) {
    case ScalarType::Double:
      return Type::kDouble;
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      return Type::kFloat;
  }
}

Sampling given_sampling(const Sizes& s, const Tensor& locations, const Tensor& weights) {
  const int64_t samples = s.heads * s.levels * s.points;
  return {type_of(locations), locations.const_data_ptr(), weights.const_data_ptr(), 2 * samples, samples, false, 0, 0};
}

// Where the logits begin in each query's part of `sampling`, or their gradients in its gradient.
template <typename Byte, typename Void>
Void* logits(const Sizes& s, const Tensor& sampling, Void* data) {
  return static_cast<Byte*>(data) + 2 * s.heads * s.levels * s.points * sampling.element_size();
}

Sampling grid_sampling(const Sizes& s, const std::vector<int64_t>& query_shape, const Tensor& sampling) {
  const void* const data = sampling.const_data_ptr();
  const int64_t step = 3 * s.heads * s.levels * s.points;
  return {
      type_of(sampling), data, logits<const char>(s, sampling, data), step, step, true, query_shape[0], query_shape[1]};
}

// The number of threads the work is worth: a step is about one multiply-add.
int64_t threads_for(int64_t steps) {
  constexpr int64_t kStepsPerThread = 1 << 16;
  return std::min<int64_t>(torch::stable::get_num_threads(), steps / kStepsPerThread + 1);
}

// How many heads to take at a time. Their samples of one query should fill a cache line (16 floats), or every line is
// fetched more than once; but no thread should have more to do than needed.
int64_t heads_at_a_time(const Sizes& s, int64_t threads) {
  const int64_t filling = std::clamp<int64_t>(16 / std::max<int64_t>(1, s.levels * s.points), 1, s.heads);
  int64_t best = 1, least = std::numeric_limits<int64_t>::max();
  for (int64_t heads = filling; heads > 0; --heads) {
    const int64_t groups = s.batch * ((s.heads + heads - 1) / heads);
    const int64_t most = (groups + threads - 1) / threads * heads;
    if (most < least) {
      best = heads;
      least = most;
    }
  }
  return best;
}

template <typename T>
Call<T> make_call(
    const Sizes& s,
    const std::vector<int64_t>& spatial_shapes,
    const Tensor& value,
    const Sampling& sampling,
    int64_t threads) {
  Call<T> call{};
  call.batch = s.batch;
  call.values = s.values;
  call.heads = s.heads;
  call.width = s.width;
  call.queries = s.queries;
  call.levels = s.levels;
  call.points = s.points;
  call.spatial_shapes = spatial_shapes.data();
  call.value = static_cast<const T*>(value.const_data_ptr());
  call.sampling = sampling;
  call.heads_at_a_time = heads_at_a_time(s, threads);
  // Where there are more threads than heads, several share a head. Each packs it for itself.
  call.query_parts = std::max<int64_t>(1, threads / (s.batch * s.heads));
  return call;
}

template <typename F>
void parallel(int64_t count, int64_t threads, const F& f) {
  torch::stable::parallel_for(0, count, (count + threads - 1) / threads, f);
}

int64_t steps(const Sizes& s) {
  return s.batch * s.heads * (4 * s.queries * s.levels * s.points + s.values) * padded_width(s.width);
}

// Places in a map are counted in 32 bits.
void check_map(const Sizes& s, const std::vector<int64_t>& spatial_shapes) {
  int64_t pixels = 0;
  for (int64_t level = 0; level < s.levels; ++level) {
    pixels += packed_pixels(spatial_shapes[2 * level], spatial_shapes[2 * level + 1]);
    STD_TORCH_CHECK(
        pixels < std::numeric_limits<int32_t>::max() / std::max(kLanes, padded_width(s.width)),
        "deformable attention: one head of one image has 2^31 values or more");
  }
}

Tensor run_forward(
    const Sizes& s, const std::vector<int64_t>& spatial_shapes, const Tensor& value, const Sampling& sampling) {
  check_map(s, spatial_shapes);
  Tensor output = torch::stable::new_empty(value, {s.batch, s.queries, s.heads * s.width});
  if (output.numel() == 0) {
    return output;
  }
  dispatch(value.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t threads = threads_for(steps(s));
    Call<T> call = make_call<T>(s, spatial_shapes, value, sampling, threads);
    call.output = static_cast<T*>(output.mutable_data_ptr());
    const Kernels<T> run = kernels<T>();
    parallel(s.batch * call.groups() * call.query_parts, threads, [&](int64_t begin, int64_t end) {
      run.forward(call, begin, end);
    });
  });
  return output;
}

// Where the output is empty, no kernel runs and gradients are zero.
Tensor new_gradient(const Tensor& input, const Tensor& grad_output) {
  return grad_output.numel() == 0 ? torch::stable::new_zeros(input, input.sizes())
                                  : torch::stable::new_empty(input, input.sizes());
}

// Returns the gradient of value, and writes the others.
Tensor run_backward(
    const Sizes& s,
    const std::vector<int64_t>& spatial_shapes,
    const Tensor& grad_output_,
    const Tensor& value,
    const Sampling& sampling,
    void* grad_locations,
    void* grad_weights) {
  check_map(s, spatial_shapes);
  check_grad_output(grad_output_, value, s);
  const Tensor grad_output = torch::stable::contiguous(grad_output_);
  Tensor grad_value = new_gradient(value, grad_output);
  if (grad_output.numel() == 0) {
    return grad_value;
  }
  dispatch(value.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t threads = threads_for(3 * steps(s));
    Call<T> call = make_call<T>(s, spatial_shapes, value, sampling, threads);
    call.grad_output = static_cast<const T*>(grad_output.const_data_ptr());
    call.grad_value = static_cast<T*>(grad_value.mutable_data_ptr());
    call.grad_locations = grad_locations;
    call.grad_weights = grad_weights;
    const Kernels<T> run = kernels<T>();
    parallel(s.batch * call.groups(), threads, [&](int64_t begin, int64_t end) { run.backward(call, begin, end); });
  });
  return grad_value;
}

Tensor forward(
    const Tensor& value_,
    const std::vector<int64_t>& spatial_shapes,
    const Tensor& locations_,
    const Tensor& weights_) {
  const Sizes s = check(value_, spatial_shapes, locations_, weights_);
  const Tensor value = torch::stable::contiguous(value_), locations = torch::stable::contiguous(locations_),
               weights = torch::stable::contiguous(weights_);
  return run_forward(s, spatial_shapes, value, given_sampling(s, locations, weights));
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output,
    const Tensor& value_,
    const std::vector<int64_t>& spatial_shapes,
    const Tensor& locations_,
    const Tensor& weights_,
    bool /* deterministic */) {
  const Sizes s = check(value_, spatial_shapes, locations_, weights_);
  const Tensor value = torch::stable::contiguous(value_), locations = torch::stable::contiguous(locations_),
               weights = torch::stable::contiguous(weights_);
  Tensor grad_locations = new_gradient(locations, grad_output);
  Tensor grad_weights = new_gradient(weights, grad_output);
  Tensor grad_value = run_backward(
      s, spatial_shapes, grad_output, value, given_sampling(s, locations, weights), grad_locations.mutable_data_ptr(),
      grad_weights.mutable_data_ptr());
  return {grad_value, grad_locations, grad_weights};
}

Tensor grid_forward(
    const Tensor& value_,
    const std::vector<int64_t>& value_shapes,
    const std::vector<int64_t>& query_shape,
    const Tensor& sampling_,
    int64_t points) {
  const Sizes s = check_grid(value_, value_shapes, query_shape, sampling_, points);
  const Tensor value = torch::stable::contiguous(value_), sampling = torch::stable::contiguous(sampling_);
  return run_forward(s, value_shapes, value, grid_sampling(s, query_shape, sampling));
}

std::tuple<Tensor, Tensor> grid_backward(
    const Tensor& grad_output,
    const Tensor& value_,
    const std::vector<int64_t>& value_shapes,
    const std::vector<int64_t>& query_shape,
    const Tensor& sampling_,
    int64_t points,
    bool /* deterministic */) {
  const Sizes s = check_grid(value_, value_shapes, query_shape, sampling_, points);
  const Tensor value = torch::stable::contiguous(value_), sampling = torch::stable::contiguous(sampling_);
  Tensor grad_sampling = new_gradient(sampling, grad_output);
  void* const grad = grad_sampling.mutable_data_ptr();
  Tensor grad_value = run_backward(
      s, value_shapes, grad_output, value, grid_sampling(s, query_shape, sampling), grad,
      logits<char>(s, grad_sampling, grad));
  return {grad_value, grad_sampling};
}

}  // namespace
}  // namespace piip::cpu

STABLE_TORCH_LIBRARY_IMPL(piip, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&piip::cpu::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&piip::cpu::backward));
  m.impl("deform_attn_grid", TORCH_BOX(&piip::cpu::grid_forward));
  m.impl("deform_attn_grid_backward", TORCH_BOX(&piip::cpu::grid_backward));
}

STABLE_TORCH_LIBRARY_IMPL(piip, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&piip::cpu::capability_name));
#ifndef PIIP_WITH_CUDA
  m.impl("cuda_version", TORCH_BOX(&piip::cpu::no_cuda));
#endif
}
