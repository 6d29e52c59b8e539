// CUDA side of the operator.
//
// A group of G neighbouring threads (the power of two from 4 to 32 that covers the channels of a head) handles one
// query and head: threads of a group read neighbouring channels, and a warp holds 32 / G queries and heads, so narrow
// heads leave few threads idle. 16-bit values are summed in float. Backward adds the gradient of the values with
// atomics, in float also for 16-bit values, and reduces the other gradients within the group.
#include <algorithm>
#include <tuple>
#include <vector>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "ms_deform_attn.h"

namespace piip::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;  // beyond that a thread takes several turns
constexpr int kMaxLevels = 32;           // the levels travel in the kernel's arguments

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

struct Levels {
  int64_t height[kMaxLevels];
  int64_t width[kMaxLevels];
  int64_t start[kMaxLevels];
};

// One sample: the element offsets of the four corners from the first channel of the head in the first row, -1 where
// outside the map, and the position within the pixel.
template <typename A>
struct Sample {
  int64_t corner[4];
  A fx, fy;
  bool inside;
};

// NaN is outside.
template <typename A>
__device__ __forceinline__ Sample<A> locate(A x, A y, int64_t height, int64_t width, int64_t start, int64_t stride) {
  Sample<A> sample;
  x = x * width - A(0.5);
  y = y * height - A(0.5);
  sample.inside = x > A(-1) && y > A(-1) && x < width && y < height;
  if (sample.inside) {
    const A left = floor(x), top = floor(y);
    const int64_t column = static_cast<int64_t>(left), line = static_cast<int64_t>(top);
    sample.fx = x - left;
    sample.fy = y - top;
    const int64_t first = (start + line * width + column) * stride;
    const bool has_left = column >= 0, has_right = column + 1 < width;
    const bool has_top = line >= 0, has_bottom = line + 1 < height;
    sample.corner[0] = has_top && has_left ? first : -1;
    sample.corner[1] = has_top && has_right ? first + stride : -1;
    sample.corner[2] = has_bottom && has_left ? first + width * stride : -1;
    sample.corner[3] = has_bottom && has_right ? first + (width + 1) * stride : -1;
  }
  return sample;
}

template <typename A>
__device__ __forceinline__ void corner_factors(const Sample<A>& sample, A (&factor)[4]) {
  factor[0] = (1 - sample.fy) * (1 - sample.fx);
  factor[1] = (1 - sample.fy) * sample.fx;
  factor[2] = sample.fy * (1 - sample.fx);
  factor[3] = sample.fy * sample.fx;
}

template <typename T, typename A>
__device__ __forceinline__ A read(const T* head, int64_t corner, int64_t channel) {
  return corner < 0 ? A(0) : static_cast<A>(head[corner + channel]);
}

template <typename T, int G>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    Sizes s,
    Levels levels,
    const T* __restrict__ value,
    const typename Accumulate<T>::type* __restrict__ locations,
    const typename Accumulate<T>::type* __restrict__ weights,
    T* __restrict__ output) {
  using A = typename Accumulate<T>::type;
  const int64_t items = s.batch * s.queries * s.heads, stride = s.heads * s.width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / G);
  const int lane = threadIdx.x % G;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * (kThreads / G) + threadIdx.x / G; item < items; item += step) {
    const int64_t image = item / s.heads / s.queries, head = item % s.heads;
    const T* const values = value + image * s.values * stride + head * s.width;
    for (int64_t channel = lane; channel < s.width; channel += G) {
      A sum = 0;
      int64_t index = item * s.levels * s.points;
      for (int64_t level = 0; level < s.levels; ++level) {
        for (int64_t point = 0; point < s.points; ++point, ++index) {
          const Sample<A> sample = locate(
              locations[2 * index], locations[2 * index + 1], levels.height[level], levels.width[level],
              levels.start[level], stride);
          if (sample.inside) {
            A factor[4];
            corner_factors(sample, factor);
            A bilinear = 0;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              bilinear += factor[k] * read<T, A>(values, sample.corner[k], channel);
            }
            sum += weights[index] * bilinear;
          }
        }
      }
      output[item * s.width + channel] = static_cast<T>(sum);
    }
  }
}

// Sums over the threads of a group; the result is in its first thread.
template <int G, typename A>
__device__ __forceinline__ A group_sum(A x, unsigned mask) {
#pragma unroll
  for (int offset = G / 2; offset > 0; offset /= 2) {
    x += __shfl_down_sync(mask, x, offset, G);
  }
  return x;
}

template <typename T, int G>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    Sizes s,
    Levels levels,
    const T* __restrict__ grad_output,
    const T* __restrict__ value,
    const typename Accumulate<T>::type* __restrict__ locations,
    const typename Accumulate<T>::type* __restrict__ weights,
    typename Accumulate<T>::type* __restrict__ grad_value,
    typename Accumulate<T>::type* __restrict__ grad_locations,
    typename Accumulate<T>::type* __restrict__ grad_weights) {
  using A = typename Accumulate<T>::type;
  const int64_t items = s.batch * s.queries * s.heads, stride = s.heads * s.width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / G);
  const int lane = threadIdx.x % G;
  // The threads of this group within their warp: groups of one warp may run through the loops differently.
  const unsigned mask = (0xffffffffu >> (32 - G)) << (threadIdx.x % 32 / G * G);
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * (kThreads / G) + threadIdx.x / G; item < items; item += step) {
    const int64_t image = item / s.heads / s.queries, head = item % s.heads;
    const int64_t first = image * s.values * stride + head * s.width;
    int64_t index = item * s.levels * s.points;
    for (int64_t level = 0; level < s.levels; ++level) {
      for (int64_t point = 0; point < s.points; ++point, ++index) {
        const Sample<A> sample = locate(
            locations[2 * index], locations[2 * index + 1], levels.height[level], levels.width[level],
            levels.start[level], stride);
        A grad_x = 0, grad_y = 0, grad_weight = 0;
        if (sample.inside) {
          const A weight = weights[index];
          A factor[4], product[4] = {0, 0, 0, 0};
          corner_factors(sample, factor);
          for (int64_t channel = lane; channel < s.width; channel += G) {
            const A grad = static_cast<A>(grad_output[item * s.width + channel]);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              if (sample.corner[k] >= 0) {
                product[k] += grad * static_cast<A>(value[first + sample.corner[k] + channel]);
                atomicAdd(grad_value + first + sample.corner[k] + channel, weight * factor[k] * grad);
              }
            }
          }
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            product[k] = group_sum<G>(product[k], mask);
          }
          const A upper = product[0] + sample.fx * (product[1] - product[0]);
          const A lower = product[2] + sample.fx * (product[3] - product[2]);
          const A sideways = (1 - sample.fy) * (product[1] - product[0]) + sample.fy * (product[3] - product[2]);
          grad_x = weight * levels.width[level] * sideways;
          grad_y = weight * levels.height[level] * (lower - upper);
          grad_weight = upper + sample.fy * (lower - upper);
        }
        if (lane == 0) {
          grad_locations[2 * index] = grad_x;
          grad_locations[2 * index + 1] = grad_y;
          grad_weights[index] = grad_weight;
        }
      }
    }
  }
}

Levels make_levels(const std::vector<int64_t>& spatial_shapes) {
  STD_TORCH_CHECK(
      spatial_shapes.size() <= 2 * kMaxLevels, "ms_deform_attn: at most ", kMaxLevels, " levels on CUDA, got ",
      spatial_shapes.size() / 2);
  Levels levels{};
  int64_t start = 0;
  for (size_t level = 0; level < spatial_shapes.size() / 2; ++level) {
    levels.height[level] = spatial_shapes[2 * level];
    levels.width[level] = spatial_shapes[2 * level + 1];
    levels.start[level] = start;
    start += levels.height[level] * levels.width[level];
  }
  return levels;
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_same_device(const Tensor& value, const Tensor& other) {
  STD_TORCH_CHECK(
      other.is_cuda() && other.get_device_index() == value.get_device_index(),
      "ms_deform_attn: all tensors must be on the device of value");
}

// Calls f with a null pointer to the element type.
template <typename F>
void dispatch_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<torch::headeronly::Half*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<torch::headeronly::BFloat16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "ms_deform_attn: value must be float64, float32, float16 or bfloat16");
  }
}

// Calls f with the number of threads for a head of this width, as a compile-time constant.
template <typename F>
void dispatch_group(int64_t width, const F& f) {
  if (width <= 4) {
    f(std::integral_constant<int, 4>{});
  } else if (width <= 8) {
    f(std::integral_constant<int, 8>{});
  } else if (width <= 16) {
    f(std::integral_constant<int, 16>{});
  } else {
    f(std::integral_constant<int, 32>{});
  }
}

unsigned blocks(const Sizes& s, int group) {
  const int64_t per_block = kThreads / group, items = s.batch * s.queries * s.heads;
  return static_cast<unsigned>(std::min((items + per_block - 1) / per_block, kMaxBlocks));
}

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
  if (output.numel() == 0) {
    return output;
  }
  const Levels levels = make_levels(spatial_shapes);
  dispatch_type(value.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename Accumulate<T>::type;
    dispatch_group(s.width, [&](auto group) {
      constexpr int G = decltype(group)::value;
      forward_kernel<T, G><<<blocks(s, G), kThreads, 0, current_stream(value)>>>(
          s, levels, static_cast<const T*>(value.const_data_ptr()), static_cast<const A*>(locations.const_data_ptr()),
          static_cast<const A*>(weights.const_data_ptr()), static_cast<T*>(output.mutable_data_ptr()));
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output_,
    const Tensor& value_,
    const std::vector<int64_t>& spatial_shapes,
    const Tensor& locations_,
    const Tensor& weights_) {
  const Sizes s = check(value_, spatial_shapes, locations_, weights_);
  check_grad_output(grad_output_, value_, s);
  check_same_device(value_, grad_output_);
  check_same_device(value_, locations_);
  check_same_device(value_, weights_);
  const torch::stable::accelerator::DeviceGuard guard(value_.get_device_index());
  const Tensor value = torch::stable::contiguous(value_), locations = torch::stable::contiguous(locations_),
               weights = torch::stable::contiguous(weights_), grad_output = torch::stable::contiguous(grad_output_);
  // Atomics add in the dtype of the locations; 16-bit gradients are rounded once, at the end.
  Tensor grad_value = torch::stable::new_zeros(value, value.sizes(), locations.scalar_type());
  Tensor grad_locations = torch::stable::new_empty(locations, locations.sizes());
  Tensor grad_weights = torch::stable::new_empty(weights, weights.sizes());
  if (s.batch * s.queries * s.heads > 0) {
    const Levels levels = make_levels(spatial_shapes);
    dispatch_type(value.scalar_type(), [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      using A = typename Accumulate<T>::type;
      dispatch_group(s.width, [&](auto group) {
        constexpr int G = decltype(group)::value;
        backward_kernel<T, G><<<blocks(s, G), kThreads, 0, current_stream(value)>>>(
            s, levels, static_cast<const T*>(grad_output.const_data_ptr()),
            static_cast<const T*>(value.const_data_ptr()),
            static_cast<const A*>(locations.const_data_ptr()), static_cast<const A*>(weights.const_data_ptr()),
            static_cast<A*>(grad_value.mutable_data_ptr()), static_cast<A*>(grad_locations.mutable_data_ptr()),
            static_cast<A*>(grad_weights.mutable_data_ptr()));
      });
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (grad_value.scalar_type() == value.scalar_type()) {
    return {grad_value, grad_locations, grad_weights};
  }
  Tensor rounded = torch::stable::new_empty(value, value.sizes());
  torch::stable::copy_(rounded, grad_value);
  return {rounded, grad_locations, grad_weights};
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
