// The CUDA kernels, free of PyTorch's runtime, so that the tests can run them on a CPU, too.
//
// A group of neighbouring threads handles one query and head, each thread a pack of N channels that it reads with one
// instruction. A warp holds as many whole groups as fit: widths of 6, 12 or 24 channels need groups of 3 or 6 threads,
// which are not padded to powers of two. 16-bit values are summed in float. Backward adds the gradient of the values
// with atomics, in float also for 16-bit values, or in fixed point, where the order of additions does not matter; it
// reduces the other gradients within the group.
#pragma once

#include "cuda/sampling.cuh"

namespace piip::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T element[N];
};

template <typename T, int N, typename A>
__device__ __forceinline__ void read_pack(const T* from, A (&to)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[i] = static_cast<A>(pack.element[i]);
  }
}

template <typename T, int N, typename A>
__device__ __forceinline__ void write_pack(const A (&from)[N], T* to) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    pack.element[i] = static_cast<T>(from[i]);
  }
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// How threads share the work: `threads` of them per query and head, `per_warp` such groups in a warp.
struct Grouping {
  int threads;
  int per_warp;
  int half;  // the first step of a sum over a group: half of its size rounded up to a power of two
};

// The place of this thread in its warp, and the warp's share of an image's queries and heads.
struct Place {
  int lane, slot;  // in the group; of the group
  int64_t first, step;

  __device__ explicit Place(const Grouping& grouping) {
    const int in_warp = threadIdx.x % kWarp, warps = kThreads / kWarp;
    slot = in_warp / grouping.threads;
    lane = in_warp - slot * grouping.threads;
    first = (static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarp) * grouping.per_warp;
    step = static_cast<int64_t>(gridDim.x) * warps * grouping.per_warp;
  }
};

template <typename T, int N, typename I, typename Source>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    Sizes s, Grouping grouping, Levels levels, Source source, const T* __restrict__ value, T* __restrict__ output) {
  using A = typename Accumulate<T>::type;
  const int64_t items = s.queries * s.heads, stride = s.heads * s.width;
  const Place place(grouping);
  if (place.slot >= grouping.per_warp) {
    return;
  }
  for (int64_t image = blockIdx.y; image < s.batch; image += gridDim.y) {
    for (int64_t item = place.first + place.slot; item < items; item += place.step) {
      const int64_t query = static_cast<I>(item) / static_cast<I>(s.heads), head = item - query * s.heads;
      const typename Source::Item samples(source, s, image, query, head);
      const T* const values = value + image * s.values * stride + head * s.width;
      for (int channel = place.lane * N; channel < s.width; channel += grouping.threads * N) {
        A sum[N] = {};
        int index = 0;
        for (int level = 0; level < s.levels; ++level) {
          const int32_t height = levels.height[level], width = levels.width[level];
          for (int point = 0; point < s.points; ++point, ++index) {
            A x, y, factor[4];
            samples.position(index, height, width, x, y);
            const Sample<A, I> sample(x, y, height, width, levels.start[level], stride);
            sample.factors(samples.weight(index), factor);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              A element[N] = {};
              if (sample.corner[k] >= 0) {
                read_pack<T, N>(values + sample.corner[k] + channel, element);
              }
#pragma unroll
              for (int i = 0; i < N; ++i) {
                sum[i] += factor[k] * element[i];
              }
            }
          }
        }
        write_pack<T, N>(sum, output + (image * items + item) * s.width + channel);
      }
    }
  }
}

// Adds up the gradient of the values in floating point: fast, but the sum depends on the order.
template <typename A>
struct AtomicSum {
  A* sum;

  template <int N>
  __device__ __forceinline__ void add(int64_t offset, const A (&x)[N]) const {
    A* const to = sum + offset;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    constexpr bool fours = sizeof(A) == 4 && N % 4 == 0, twos = sizeof(A) == 4 && N == 2;
#else
    constexpr bool fours = false, twos = false;
#endif
    if constexpr (fours) {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        atomicAdd(reinterpret_cast<float4*>(to + i), make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
      }
    } else if constexpr (twos) {
      atomicAdd(reinterpret_cast<float2*>(to), make_float2(x[0], x[1]));
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        atomicAdd(to + i, x[i]);
      }
    }
  }
};

// The same in 64-bit fixed point: integers give one sum in every order. `scale` is a power of two, so large that the
// largest possible sum just fits: what is lost lies far below the rounding of float.
struct FixedPointSum {
  unsigned long long* sum;
  const double* scale;

  template <int N, typename A>
  __device__ __forceinline__ void add(int64_t offset, const A (&x)[N]) const {
    const double factor = *scale;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const long long fixed = static_cast<long long>(rint(static_cast<double>(x[i]) * factor));
      atomicAdd(sum + offset + i, static_cast<unsigned long long>(fixed));
    }
  }
};

// Sums over the threads of a group; the result is in its first thread. The whole warp must call it.
template <typename A>
__device__ __forceinline__ A group_sum(A x, const Grouping& grouping, int lane) {
  for (int offset = grouping.half; offset > 0; offset /= 2) {
    const A other = __shfl_down_sync(kAllLanes, x, offset);
    if (lane + offset < grouping.threads) {
      x += other;
    }
  }
  return x;
}

// `scratch` in shared memory holds levels * points numbers for every group of the block, in the fused form.
template <typename T, int N, typename I, typename Source, typename Sum>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    Sizes s,
    Grouping grouping,
    Levels levels,
    Source source,
    Sum grad_value,
    const T* __restrict__ grad_output,
    const T* __restrict__ value) {
  using A = typename Accumulate<T>::type;
  extern __shared__ double scratch[];
  const int64_t items = s.queries * s.heads, stride = s.heads * s.width;
  const Place place(grouping);
  const bool in_group = place.slot < grouping.per_warp;
  const int group = threadIdx.x / kWarp * grouping.per_warp + (in_group ? place.slot : 0);
  A* const kept = reinterpret_cast<A*>(scratch) + group * s.levels * s.points;
  for (int64_t image = blockIdx.y; image < s.batch; image += gridDim.y) {
    for (int64_t first = place.first; first < items; first += place.step) {
      // A warp stays together for its sums; a group without work takes part with zeros.
      const bool working = in_group && first + place.slot < items;
      const int64_t item = working ? first + place.slot : first;
      const int64_t query = static_cast<I>(item) / static_cast<I>(s.heads), head = item - query * s.heads;
      const typename Source::Item samples(source, s, image, query, head);
      const int64_t first_value = image * s.values * stride + head * s.width;
      const T* const grads = grad_output + (image * items + item) * s.width;
      int index = 0;
      for (int level = 0; level < s.levels; ++level) {
        const int32_t height = levels.height[level], width = levels.width[level];
        for (int point = 0; point < s.points; ++point, ++index) {
          A x, y, factor[4], product[4] = {0, 0, 0, 0};
          samples.position(index, height, width, x, y);
          const Sample<A, I> sample(x, y, height, width, levels.start[level], stride);
          const A weight = samples.weight(index);
          sample.factors(weight, factor);
          for (int channel = place.lane * N; working && channel < s.width; channel += grouping.threads * N) {
            A grad[N];
            read_pack<T, N>(grads + channel, grad);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              if (sample.corner[k] >= 0) {
                const int64_t offset = first_value + sample.corner[k] + channel;
                A element[N], part[N];
                read_pack<T, N>(value + offset, element);
#pragma unroll
                for (int i = 0; i < N; ++i) {
                  product[k] += grad[i] * element[i];
                  part[i] = factor[k] * grad[i];
                }
                grad_value.add(offset, part);
              }
            }
          }
          const A upper = product[0] + sample.fx * (product[1] - product[0]);
          const A lower = product[2] + sample.fx * (product[3] - product[2]);
          A sideways = (1 - sample.fy) * (product[1] - product[0]) + sample.fy * (product[3] - product[2]);
          A downwards = lower - upper, whole = upper + sample.fy * (lower - upper);
          sideways = group_sum(sideways, grouping, place.lane);
          downwards = group_sum(downwards, grouping, place.lane);
          whole = group_sum(whole, grouping, place.lane);
          if (working && place.lane == 0) {
            samples.write(index, height, width, weight * sideways, weight * downwards, whole, kept);
          }
        }
      }
      if (working && place.lane == 0) {
        samples.finish(static_cast<int>(s.levels * s.points), kept);
      }
    }
  }
}

// The bits of a float or double without its sign: as an unsigned number they sort as the magnitudes do, NaN above all.
__device__ __forceinline__ unsigned long long magnitude_bits(double x) {
  unsigned long long bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffffffffffull;
}

// Raises *largest to the magnitude of the largest element.
template <typename T>
__global__ void __launch_bounds__(kThreads) largest_kernel(const T* x, int64_t size, unsigned long long* largest) {
  unsigned long long mine = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < size; i += step) {
    const unsigned long long bits = magnitude_bits(static_cast<double>(x[i]));
    mine = bits > mine ? bits : mine;
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const unsigned long long other = __shfl_down_sync(kAllLanes, mine, offset);
    mine = other > mine ? other : mine;
  }
  if (threadIdx.x % kWarp == 0) {
    atomicMax(largest, mine);
  }
}

// The scale of a FixedPointSum of `count` products of a gradient and a weight, from the bits of the largest gradient
// and, unless weights are known to be at most 1, of the largest weight. NaN if one of them is infinite or NaN, so that
// the whole gradient becomes NaN rather than wrong.
static __global__ void scale_kernel(const unsigned long long* largest, bool with_weights, double count, double* scale) {
  double bound = count;
  for (int i = 0; i < (with_weights ? 2 : 1); ++i) {
    double magnitude;
    memcpy(&magnitude, largest + i, sizeof magnitude);
    bound *= magnitude;
  }
  int exponent = 0;
  frexp(bound, &exponent);  // bound < 2^exponent
  const bool finite = bound - bound == 0;
  const int shift = 61 - exponent < 1000 ? 61 - exponent : 1000;
  *scale = !finite ? bound - bound : bound > 0 ? ldexp(1.0, shift) : 1.0;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) from_fixed_point_kernel(
    const unsigned long long* sum, const double* scale, int64_t size, T* to) {
  const double unit = 1 / *scale;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < size; i += step) {
    to[i] = static_cast<T>(static_cast<typename Accumulate<T>::type>(static_cast<long long>(sum[i]) * unit));
  }
}

}  // namespace piip::cuda
