// The CUDA kernels, run by the emulator, behind a C interface for ctypes. Included: float, and bfloat16 for 16-bit types.
#include "emulator.h"

#include <torch/headeronly/util/BFloat16.h>

#include "cuda/kernels.cuh"

namespace {

using namespace piip;
using namespace piip::cuda;
using torch::headeronly::BFloat16;

// The arguments of every call; null pointers where a form or direction has no such tensor.
extern "C" struct Call {
  Sizes sizes;
  int32_t lines, columns, threads_of_a_group, bits_of_offsets, fixed_point;
  const int64_t* shapes;
  const void *value, *grad_output, *sampling;
  const float *locations, *weights;
  void *output, *grad_value, *grad_sampling;
  float *grad_locations, *grad_weights;
};

Levels make_levels(const Call& call) {
  Levels levels{};
  for (int level = 0, start = 0; level < call.sizes.levels; ++level) {
    levels.height[level] = call.shapes[2 * level];
    levels.width[level] = call.shapes[2 * level + 1];
    levels.start[level] = start;
    start += call.shapes[2 * level] * call.shapes[2 * level + 1];
  }
  return levels;
}

template <typename T, int N, typename I, typename Source>
void run(const Call& call, const Source& source) {
  const Sizes& s = call.sizes;
  Grouping grouping{call.threads_of_a_group, kWarp / call.threads_of_a_group, 0};
  for (int size = 1; size < grouping.threads; size *= 2) {
    grouping.half = size;
  }
  const Levels levels = make_levels(call);
  const Index grid{2, 1};  // fewer blocks and images than there is work for: all loops turn
  const auto* value = static_cast<const T*>(call.value);
  const auto* grad_output = static_cast<const T*>(call.grad_output);
  if (grad_output == nullptr) {
    emulator::launch(grid, kThreads, [&] {
      forward_kernel<T, N, I>(s, grouping, levels, source, value, static_cast<T*>(call.output));
    });
    return;
  }
  const int64_t size = s.batch * s.values * s.heads * s.width;
  std::vector<float> sum(size);
  if (!call.fixed_point) {
    emulator::launch(grid, kThreads, [&] {
      backward_kernel<T, N, I>(s, grouping, levels, source, AtomicSum<float>{sum.data()}, grad_output, value);
    });
    for (int64_t i = 0; i < size; ++i) {
      static_cast<T*>(call.grad_value)[i] = sum[i];
    }
    return;
  }
  std::vector<unsigned long long> fixed(size), largest(2);
  double scale;
  const int64_t samples = s.levels * s.points, queries = s.batch * s.queries;
  emulator::launch(grid, kThreads, [&] {
    largest_kernel(grad_output, queries * s.heads * s.width, largest.data());
  });
  if (!Source::kFused) {
    emulator::launch(grid, kThreads, [&] {
      largest_kernel(call.weights, queries * s.heads * samples, largest.data() + 1);
    });
  }
  scale_kernel(largest.data(), !Source::kFused, double(s.queries) * (Source::kFused ? 1 : samples), &scale);
  emulator::launch(grid, kThreads, [&] {
    backward_kernel<T, N, I>(s, grouping, levels, source, FixedPointSum{fixed.data(), &scale}, grad_output, value);
  });
  emulator::launch(grid, kThreads, [&] {
    from_fixed_point_kernel(fixed.data(), &scale, size, static_cast<T*>(call.grad_value));
  });
}

template <typename T, int N>
void run_form(const Call& call) {
  const auto with = [&](const auto& source) {
    call.bits_of_offsets == 64 ? run<T, N, int64_t>(call, source) : run<T, N, int32_t>(call, source);
  };
  if (call.sampling == nullptr) {
    with(Locations<float>{call.locations, call.weights, call.grad_locations, call.grad_weights});
  } else {
    with(GridOffsets<float, T>{
        static_cast<const T*>(call.sampling), static_cast<T*>(call.grad_sampling), call.lines, call.columns});
  }
}

}  // namespace

// Calls f and returns the message of its error, or null.
template <typename F>
const char* guarded(const F& f) {
  static std::string message;
  try {
    f();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

// A kernel that a GPU would not bear: half of the warp is gone when the rest adds up.
extern "C" const char* run_broken_kernel() {
  return guarded([] {
    emulator::launch({1, 1}, kWarp, [] { threadIdx.x < 16 ? group_sum(1.0, {32, 1, 16}, threadIdx.x) : 0.0; });
  });
}

// One call with packs of `pack` channels.
extern "C" const char* run_float(const Call* call, int pack) {
  return guarded([&] {
    pack == 4 ? run_form<float, 4>(*call) : pack == 2 ? run_form<float, 2>(*call) : run_form<float, 1>(*call);
  });
}

extern "C" const char* run_bfloat16(const Call* call, int pack) {
  return guarded([&] { pack == 8 ? run_form<BFloat16, 8>(*call) : run_form<BFloat16, 1>(*call); });
}
