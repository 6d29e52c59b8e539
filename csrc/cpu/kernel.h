// Interface between the operator (ms_deform_attn_cpu.cpp) and its kernels, which kernel_impl.h compiles once per
// instruction set. No PyTorch headers here: an inline function of theirs, compiled for AVX-512 in one file, could be
// the copy the linker keeps for all files.
#pragma once

#include <cstdint>

namespace piip::cpu {

struct HalfBits {
  uint16_t bits;
};
struct BFloat16Bits {
  uint16_t bits;
};

// Type of locations, weights, sums and their gradients.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

constexpr int64_t kLanes = 8;  // channels handled by one instruction (on narrower machines, by a few)

// Channels of a packed row: the width per head rounded up to full vectors.
inline int64_t padded_width(int64_t width) {
  return (width + kLanes - 1) / kLanes * kLanes;
}

// Contiguous tensors, laid out as in the operator's schema; forward ignores the gradients, backward the output.
template <typename T>
struct Call {
  using A = typename Accumulate<T>::type;
  int64_t batch, values, heads, width, queries, levels, points;
  const int64_t* spatial_shapes;
  const T* value;
  const A* locations;
  const A* weights;
  T* output;
  const T* grad_output;
  T* grad_value;
  A* grad_locations;
  A* grad_weights;
  // Scratch, both (batch, heads, values + 1, padded width): the values as packed rows, and their gradient.
  A* rows;
  A* grad_rows;
};

// The three steps. [begin, end) is one thread's share: of batch * (values + 1), of batch * queries, and of
// batch * heads, so that no two threads ever write to the same place.
#define PIIP_DECLARE_KERNELS(capability)                                  \
  namespace capability {                                                  \
  template <typename T>                                                   \
  void pack(const Call<T>& call, int64_t begin, int64_t end);             \
  template <typename T>                                                   \
  void forward(const Call<T>& call, int64_t begin, int64_t end);          \
  template <typename T>                                                   \
  void backward(const Call<T>& call, int64_t begin, int64_t end);         \
  }

PIIP_DECLARE_KERNELS(portable)
#if defined(__x86_64__)
PIIP_DECLARE_KERNELS(avx2)
PIIP_DECLARE_KERNELS(avx512)
#endif

}  // namespace piip::cpu
