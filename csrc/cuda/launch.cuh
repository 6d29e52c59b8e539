// The host's side of the kernels, which both forms of the operator share: which kernel runs, and on how many threads.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda/kernels.cuh"
#include "ms_deform_attn.h"

namespace piip::cuda {

constexpr int64_t kMaxBlocks = 1 << 20;  // beyond that a warp takes several turns
constexpr int64_t kMaxImages = 65535;    // the same for images, the grid's second axis

inline Levels make_levels(const std::vector<int64_t>& spatial_shapes) {
  STD_TORCH_CHECK(
      spatial_shapes.size() <= 2 * kMaxLevels, "deformable attention: at most ", kMaxLevels, " levels on CUDA, got ",
      spatial_shapes.size() / 2);
  Levels levels{};
  int64_t start = 0;
  for (size_t level = 0; level < spatial_shapes.size() / 2; ++level) {
    const int64_t height = spatial_shapes[2 * level], width = spatial_shapes[2 * level + 1];
    STD_TORCH_CHECK(
        height <= INT32_MAX && width <= INT32_MAX, "deformable attention: a map of ", height, " x ", width,
        " is too large for CUDA");
    levels.height[level] = static_cast<int32_t>(height);
    levels.width[level] = static_cast<int32_t>(width);
    levels.start[level] = start;
    start += height * width;
  }
  return levels;
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_same_device(const Tensor& value, const Tensor& other) {
  STD_TORCH_CHECK(
      other.is_cuda() && other.get_device_index() == value.get_device_index(),
      "deformable attention: all tensors must be on the device of value");
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
      STD_TORCH_CHECK(false, "deformable attention: value must be float64, float32, float16 or bfloat16");
  }
}

// The channels a thread reads at once: as many as 16 bytes hold and divide the width, if all rows are so aligned.
template <typename T>
int pack_size(int64_t width, std::initializer_list<const void*> pointers) {
  for (int n = sizeof(T) == 8 ? 1 : 16 / static_cast<int>(sizeof(T)); n > 1; n /= 2) {
    const bool aligned = std::all_of(pointers.begin(), pointers.end(), [&](const void* pointer) {
      return reinterpret_cast<uintptr_t>(pointer) % (n * sizeof(T)) == 0;
    });
    if (width % n == 0 && aligned) {
      return n;
    }
  }
  return 1;
}

// Calls f with the type of offsets within an image and the pack size, as compile-time constants. Only the usual cases
// are compiled for speed: `usual` and images of less than 2^31 elements.
template <typename T, typename F>
void dispatch_pack(bool usual, const Sizes& s, int pack, const F& f) {
  if (!usual || std::max(s.values, s.queries) * s.heads * s.width > INT32_MAX) {
    return f(int64_t{}, std::integral_constant<int, 1>{});
  }
  if constexpr (sizeof(T) == 2) {
    if (pack == 8) {
      return f(int32_t{}, std::integral_constant<int, 8>{});
    }
  }
  if constexpr (sizeof(T) <= 4) {
    if (pack == 4) {
      return f(int32_t{}, std::integral_constant<int, 4>{});
    }
    if (pack == 2) {
      return f(int32_t{}, std::integral_constant<int, 2>{});
    }
    return f(int32_t{}, std::integral_constant<int, 1>{});
  }
  f(int64_t{}, std::integral_constant<int, 1>{});
}

inline Grouping make_grouping(int64_t width, int pack) {
  Grouping grouping{static_cast<int>(std::min<int64_t>(kWarp, std::max<int64_t>(1, width / pack))), 0, 0};
  grouping.per_warp = kWarp / grouping.threads;
  for (int size = 1; size < grouping.threads; size *= 2) {
    grouping.half = size;
  }
  return grouping;
}

inline dim3 make_grid(const Sizes& s, const Grouping& grouping) {
  const int64_t per_block = kThreads / kWarp * grouping.per_warp, items = s.queries * s.heads;
  const int64_t blocks = std::min((items + per_block - 1) / per_block, kMaxBlocks);
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min(s.batch, kMaxImages)));
}

inline unsigned flat_blocks(int64_t size) {
  return static_cast<unsigned>(std::min<int64_t>((size + kThreads - 1) / kThreads, 4096));
}

// (B, Q, M * D) in the dtype of value. `usual` as in dispatch_pack.
template <typename T, typename Source>
void run_forward(
    bool usual, const Sizes& s, const Levels& levels, const Source& source, const Tensor& value, const Tensor& output) {
  const auto* values = static_cast<const T*>(value.const_data_ptr());
  auto* outputs = static_cast<T*>(output.mutable_data_ptr());
  dispatch_pack<T>(usual, s, pack_size<T>(s.width, {values, outputs}), [&](auto index, auto pack) {
    constexpr int N = decltype(pack)::value;
    const Grouping grouping = make_grouping(s.width, N);
    forward_kernel<T, N, decltype(index)><<<make_grid(s, grouping), kThreads, 0, current_stream(value)>>>(
        s, grouping, levels, source, values, outputs);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, int N, typename I, typename Source, typename Sum>
void launch_backward(
    const Sizes& s,
    const Levels& levels,
    const Source& source,
    const Sum& sum,
    const Tensor& grad_output,
    const Tensor& value) {
  const Grouping grouping = make_grouping(s.width, N);
  size_t scratch = 0;
  if (Source::kFused) {
    scratch = sizeof(typename Accumulate<T>::type) * s.levels * s.points * grouping.per_warp * (kThreads / kWarp);
    STD_TORCH_CHECK(
        scratch <= 48 * 1024, "deform_attn_grid_backward: ", s.levels * s.points,
        " samples per query and head are too many for the shared memory of CUDA; use ms_deform_attn");
  }
  backward_kernel<T, N, I><<<make_grid(s, grouping), kThreads, scratch, current_stream(value)>>>(
      s, grouping, levels, source, sum, static_cast<const T*>(grad_output.const_data_ptr()),
      static_cast<const T*>(value.const_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Raises *largest to the magnitude of the largest element of x.
template <typename T>
void run_largest(const Tensor& x, unsigned long long* largest) {
  if (x.numel() > 0) {
    largest_kernel<<<flat_blocks(x.numel()), kThreads, 0, current_stream(x)>>>(
        static_cast<const T*>(x.const_data_ptr()), x.numel(), largest);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

// The gradient of value; the source takes the others. `weights` are those whose magnitude is not known to be at most 1.
template <typename T, typename Source>
Tensor run_backward(
    bool usual,
    bool deterministic,
    const Sizes& s,
    const Levels& levels,
    const Source& source,
    const Tensor& grad_output,
    const Tensor& value,
    const Tensor* weights) {
  using A = typename Accumulate<T>::type;
  if (!deterministic) {
    // Atomics add in float (double for double); 16-bit gradients are rounded once, at the end.
    const ScalarType summed = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    Tensor sum = torch::stable::new_zeros(value, value.sizes(), summed);
    const int pack = pack_size<T>(s.width, {value.const_data_ptr(), grad_output.const_data_ptr()});
    dispatch_pack<T>(usual, s, pack, [&](auto index, auto pack) {
      launch_backward<T, decltype(pack)::value, decltype(index)>(
          s, levels, source, AtomicSum<A>{static_cast<A*>(sum.mutable_data_ptr())}, grad_output, value);
    });
    if (summed == value.scalar_type()) {
      return sum;
    }
    Tensor rounded = torch::stable::new_empty(value, value.sizes());
    torch::stable::copy_(rounded, sum);
    return rounded;
  }
  const cudaStream_t stream = current_stream(value);
  Tensor sum = torch::stable::new_zeros(value, value.sizes(), ScalarType::Long);
  Tensor bounds = torch::stable::new_zeros(value, {2}, ScalarType::Long);
  Tensor scale = torch::stable::new_empty(value, {1}, ScalarType::Double);
  auto* const sums = static_cast<unsigned long long*>(sum.mutable_data_ptr());
  auto* const largest = static_cast<unsigned long long*>(bounds.mutable_data_ptr());
  auto* const scales = static_cast<double*>(scale.mutable_data_ptr());
  run_largest<T>(grad_output, largest);
  if (weights != nullptr) {
    run_largest<A>(*weights, largest + 1);
  }
  // The weights of a softmax add up to 1, others to at most the largest for every sample.
  const double count = static_cast<double>(s.queries) * (weights != nullptr ? s.levels * s.points : 1);
  scale_kernel<<<1, 1, 0, stream>>>(largest, weights != nullptr, count, scales);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  launch_backward<T, 1, int64_t>(s, levels, source, FixedPointSum{sums, scales}, grad_output, value);
  Tensor grad_value = torch::stable::new_empty(value, value.sizes());
  if (value.numel() > 0) {
    from_fixed_point_kernel<<<flat_blocks(value.numel()), kThreads, 0, stream>>>(
        sums, scales, value.numel(), static_cast<T*>(grad_value.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return grad_value;
}

}  // namespace piip::cuda
