// Interface between the operators (ms_deform_attn_cpu.cpp) and their kernels, which kernel_impl.h compiles once per
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

// Type of sums, and of all that is computed before them.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

constexpr int64_t kLanes = 8;  // channels of a row come in multiples of this

// Channels of a packed row: the width per head rounded up to full vectors.
inline int64_t padded_width(int64_t width) {
  return (width + kLanes - 1) / kLanes * kLanes;
}

// Pixels of a packed level: its own, a column of zeros that ends a line and begins the next, one line of zeros above
// and two below.
inline int64_t packed_pixels(int64_t height, int64_t width) {
  return (height + 3) * (width + 1) + 1;
}

enum class Type { kDouble, kFloat, kHalf, kBFloat16 };

// Where samples come from. ms_deform_attn: normalised locations (x, y) and weights. deform_attn_grid: offsets in pixels
// from the centres of a grid of queries, and logits. The steps lead from one query to the next.
struct Sampling {
  Type type;
  const void* locations;
  const void* weights;
  int64_t locations_step, weights_step;
  bool grid;
  int64_t grid_height, grid_width;
};

// Contiguous tensors, laid out as in the operators' schemas; forward ignores the gradients, backward the output.
template <typename T>
struct Call {
  int64_t batch, values, heads, width, queries, levels, points;
  const int64_t* spatial_shapes;
  const T* value;
  Sampling sampling;
  T* output;
  const T* grad_output;
  T* grad_value;
  void* grad_locations;
  void* grad_weights;
  // How the work is cut: into groups of so many heads of one image, forward also into so many parts of the queries.
  int64_t heads_at_a_time, query_parts;

  int64_t groups() const {
    return (heads + heads_at_a_time - 1) / heads_at_a_time;
  }
};

// Packed maps are several MB. Memory that is new to the process costs more time than filling it, so a thread keeps what
// it had: one block for the values, one for their gradients. Beyond kKeptBytes it gets new memory, and frees it.
constexpr int64_t kKeptBytes = 8 << 20;
enum class Block { kValues, kGradients };
void* kept_memory(Block block, int64_t bytes);  // uninitialised, aligned to cache lines, valid until the next request

// [begin, end) is one thread's share: forward of batch * groups * query_parts, backward of batch * groups, so that no
// two threads ever write to the same place.
#define PIIP_DECLARE_KERNELS(capability)                                  \
  namespace capability {                                                  \
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
