// The CPU kernels. Compiled once per instruction set by kernel_<capability>.cpp, which define
//   PIIP_CAPABILITY  the namespace of this copy
//   PIIP_TARGET      the function attribute that selects the instruction set
//   PIIP_WIDE_BYTES  the size of a vector register
// All but the entry points is in an unnamed namespace, so copies cannot be mixed up by the linker.
//
// How it works. Widths per head are small and odd (6, 12, 24, 40), so the values are first packed: a few heads at a
// time, which then stay in the cache, into rows of float padded to a multiple of eight channels. Every access is then
// a full vector, 16-bit types are widened once instead of at each of the many reads, and neighbouring pixels share
// cache lines. Zeros around the map stand for everything outside, so sampling needs no branch.
// Samples are taken in memory order. Positions, softmax, pixels and corner weights of a block of them are computed
// together, one lane per sample; then the samples are gathered one by one, one lane per channel.
#include <cstdint>
#include <new>
#include <utility>

#include "cpu/kernel.h"

#define PIIP_INLINE PIIP_TARGET inline __attribute__((always_inline))
// Before a loop: the arrays it goes through do not overlap, so iterations may run side by side.
#if defined(__clang__)
#define PIIP_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define PIIP_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace piip::cpu::PIIP_CAPABILITY {
namespace {

inline int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Uninitialised, aligned memory.
template <typename A>
struct Array {
  explicit Array(int64_t size) : data(static_cast<A*>(operator new(size * sizeof(A), kAlign))) {}
  ~Array() {
    operator delete(data, kAlign);
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  A* const data;
  static constexpr std::align_val_t kAlign{64};
};

#include "cpu/vector.h"
#include "cpu/softmax.h"
#include "cpu/map.h"
#include "cpu/samples.h"
#include "cpu/gather.h"

// The heads [first_head, first_head + heads) of the queries [begin, end), all of one image.
template <typename T>
PIIP_TARGET void forward_heads(
    const Call<T>& call, const Map<T>& map, int64_t begin, int64_t end, int64_t first_head, int64_t heads) {
  using A = typename Accumulate<T>::type;
  Samples<T> samples(map, first_head, heads);
  const int64_t size = heads * call.width;
  const Array<A> sums(samples.queries * size + map.padded);
  for (int64_t first = begin; first < end; first += samples.queries) {
    const int64_t count = least(end - first, samples.queries);
    read_block(samples, first, count);
    locate(samples, count * samples.per_query);
    for (int64_t query = 0; query < count; ++query) {
      prefetch_samples(samples, call.sampling.locations, call.sampling.weights, first + samples.queries + query);
    }
    for_blocks<A>(map.padded, Gather<T, A>{samples, map, count, sums.data});
    T* output = call.output + first * call.heads * call.width + first_head * call.width;
    for (int64_t query = 0; query < count; ++query, output += call.heads * call.width) {
      prefetch<1>(output + samples.queries * call.heads * call.width, size);
      store_row(sums.data + query * size, size, output, output + size);
    }
  }
}

// The heads [first_head, first_head + heads) of one image.
template <typename T>
PIIP_TARGET void backward_heads(
    const Call<T>& call, const Map<T>& map, const Map<T>& grad_map, int64_t image, int64_t first_head, int64_t heads) {
  using A = typename Accumulate<T>::type;
  const int64_t row_width = call.heads * call.width, padded = map.padded;
  const int64_t end = (image + 1) * call.queries;
  const RowLoader<T, kLanes> load_row(
      call.width, call.grad_output + call.batch * call.queries * row_width, LanesUpTo<kLanes>{});
  clear(grad_map.rows, heads * grad_map.per_head);
  Samples<T> samples(map, first_head, heads);
  const Array<A> grads(samples.queries * heads * padded + kWide<A>);
  for (int64_t first = image * call.queries; first < end; first += samples.queries) {
    const int64_t count = least(end - first, samples.queries);
    read_block(samples, first, count);
    locate(samples, count * samples.per_query);
    const T* from = call.grad_output + first * row_width + first_head * call.width;
    A* grad = grads.data;
    for (int64_t query = 0; query < count; ++query, from += row_width) {
      for (int64_t head = 0; head < heads; ++head, grad += padded) {
        load_row(from + head * call.width, grad);
      }
    }
    for_blocks<A>(padded, Scatter<T, A>{samples, map, grad_map, first, count, grads.data});
    finish_gradients(samples, count * samples.per_query);
    write_block_gradients(samples, first, count);
  }
  unpack(grad_map, image, first_head, heads);
}

template <typename T>
PIIP_TARGET void run_forward(const Call<T>& call, int64_t begin, int64_t end) {
  const Map<T> map(call, Block::kValues);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t group = index / call.query_parts, part = index % call.query_parts;
    const int64_t image = group / call.groups(), head = group % call.groups() * call.heads_at_a_time;
    const int64_t heads = least(call.heads_at_a_time, call.heads - head);
    if (index == begin || part == 0) {
      pack(map, image, head, heads);
    }
    const int64_t first = image * call.queries;
    forward_heads(
        call, map, first + call.queries * part / call.query_parts, first + call.queries * (part + 1) / call.query_parts,
        head, heads);
  }
}

template <typename T>
PIIP_TARGET void run_backward(const Call<T>& call, int64_t begin, int64_t end) {
  const Map<T> map(call, Block::kValues), grad_map(call, Block::kGradients);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t image = group / call.groups(), head = group % call.groups() * call.heads_at_a_time;
    const int64_t heads = least(call.heads_at_a_time, call.heads - head);
    pack(map, image, head, heads);
    backward_heads(call, map, grad_map, image, head, heads);
  }
}

}  // namespace

// The entry points are without PIIP_TARGET: an explicit instantiation would not take it from the definition.
template <typename T>
void forward(const Call<T>& call, int64_t begin, int64_t end) {
  run_forward(call, begin, end);
}

template <typename T>
void backward(const Call<T>& call, int64_t begin, int64_t end) {
  run_backward(call, begin, end);
}

#define PIIP_INSTANTIATE(T)                                      \
  template void forward<T>(const Call<T>&, int64_t, int64_t);    \
  template void backward<T>(const Call<T>&, int64_t, int64_t);
PIIP_INSTANTIATE(double)
PIIP_INSTANTIATE(float)
PIIP_INSTANTIATE(HalfBits)
PIIP_INSTANTIATE(BFloat16Bits)
#undef PIIP_INSTANTIATE

}  // namespace piip::cpu::PIIP_CAPABILITY
