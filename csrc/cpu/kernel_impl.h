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

// Channels in kCount vectors V of one query and head, whose samples begin at `first`: sums the samples.
template <typename V, int kCount, typename T, typename A>
PIIP_INLINE void gather_block(const Samples<T>& s, int64_t first, const A* rows, A* sum) {
  constexpr int64_t kLane = sizeof(V) / sizeof(A);
  const int64_t padded = s.padded;
  const A* corner = s.corner + 4 * first;
  V left[kCount] = {}, right[kCount] = {};
  for (int64_t i = first; i < first + s.per_head; ++i, corner += 4) {
    const A *top = rows + s.top[i], *bottom = rows + s.bottom[i];
    for (int j = 0; j < kCount; ++j) {
      left[j] += corner[0] * read<V>(top + j * kLane);
      right[j] += corner[1] * read<V>(top + padded + j * kLane);
      left[j] += corner[2] * read<V>(bottom + j * kLane);
      right[j] += corner[3] * read<V>(bottom + padded + j * kLane);
    }
  }
  for (int j = 0; j < kCount; ++j) {
    write(sum + j * kLane, left[j] + right[j]);
  }
}

// The reverse for kSamples samples from `first` on: spreads the gradient over their pixels, and adds up the products of
// gradient and value, from which the gradients of locations and weights follow.
template <int kSamples, typename V, int kCount, typename T, typename A>
PIIP_INLINE void scatter_samples(
    const Samples<T>& s, int64_t first, const V (&grad)[kCount], const A* rows, A* grad_rows, bool add) {
  constexpr int64_t kLane = sizeof(V) / sizeof(A);
  const A* corner = s.corner + 4 * first;
  Vec<A> products[4 * kSamples];
  for (int i = 0; i < kSamples; ++i) {
    const int64_t top = s.top[first + i], bottom = s.bottom[first + i];
    const int64_t pixel[4] = {top, top + s.padded, bottom, bottom + s.padded};
    for (int k = 0; k < 4; ++k) {
      const A* row = rows + pixel[k];
      A* grad_row = grad_rows + pixel[k];
      V product{};
      for (int j = 0; j < kCount; ++j) {
        product += grad[j] * read<V>(row + j * kLane);
        write(grad_row + j * kLane, read<V>(grad_row + j * kLane) + corner[4 * i + k] * grad[j]);
      }
      products[4 * i + k] = to_lanes<A>(product);
    }
  }
  Vec<A, 4 * kSamples> sums = sum_lanes<A>(products);
  A* product = s.product + 4 * first;
  if (add) {
    sums += read<Vec<A, 4 * kSamples>>(product);
  }
  write(product, sums);
}

template <typename V, int kCount, typename T, typename A>
PIIP_INLINE void scatter_block(
    const Samples<T>& s, int64_t first, const A* grad, const A* rows, A* grad_rows, bool add) {
  V vectors[kCount];
  for (int j = 0; j < kCount; ++j) {
    vectors[j] = read<V>(grad + j * static_cast<int64_t>(sizeof(V) / sizeof(A)));
  }
  const int64_t last = first + s.per_head;
  for (; first + 2 <= last; first += 2) {
    scatter_samples<2>(s, first, vectors, rows, grad_rows, add);
  }
  for (; first < last; ++first) {
    scatter_samples<1>(s, first, vectors, rows, grad_rows, add);
  }
}

// Goes through the channels of a padded row in blocks that fit into registers: the widest vectors, then one of kLanes.
template <typename A, typename F>
PIIP_INLINE void for_blocks(int64_t padded, const F& f) {
  using Wide = Vec<A, kWide<A>>;
  int64_t channel = 0;
  for (; channel + 4 * kWide<A> <= padded; channel += 4 * kWide<A>) {
    f.template run<Wide, 4>(channel);
  }
  const int64_t left = (padded - channel) / kWide<A>;
  if (left == 1) {
    f.template run<Wide, 1>(channel);
  } else if (left == 2) {
    f.template run<Wide, 2>(channel);
  } else if (left == 3) {
    f.template run<Wide, 3>(channel);
  }
  channel += left * kWide<A>;
  if (channel < padded) {
    f.template run<Vec<A>, 1>(channel);
  }
}

template <typename T, typename A>
struct Gather {
  const Samples<T>& s;
  int64_t first;
  const A* rows;
  A* sum;
  template <typename V, int kCount>
  PIIP_INLINE void run(int64_t channel) const {
    gather_block<V, kCount>(s, first, rows + channel, sum + channel);
  }
};

template <typename T, typename A>
struct Scatter {
  const Samples<T>& s;
  int64_t first;
  const A* grad;
  const A* rows;
  A* grad_rows;
  template <typename V, int kCount>
  PIIP_INLINE void run(int64_t channel) const {
    scatter_block<V, kCount>(s, first, grad + channel, rows + channel, grad_rows + channel, channel > 0);
  }
};

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
    A* sum = sums.data;  // the padding of one head is overwritten by the next
    for (int64_t query = 0, sample = 0; query < count; ++query) {
      prefetch_sampling(samples, first + samples.queries + query);
      for (int64_t head = 0; head < heads; ++head, sample += samples.per_head, sum += call.width) {
        for_blocks<A>(map.padded, Gather<T, A>{samples, sample, map.rows.data + head * map.per_head, sum});
      }
    }
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
  const int64_t row_width = call.heads * call.width, size = heads * call.width, padded = map.padded;
  const int64_t end = (image + 1) * call.queries;
  const T* const grad_end = call.grad_output + call.batch * call.queries * row_width;
  clear(grad_map.rows.data, heads * grad_map.per_head);
  Samples<T> samples(map, first_head, heads);
  const Array<A> grads(samples.queries * heads * padded);
  for (int64_t first = image * call.queries; first < end; first += samples.queries) {
    const int64_t count = least(end - first, samples.queries);
    read_block(samples, first, count);
    locate(samples, count * samples.per_query);
    const T* from = call.grad_output + first * row_width + first_head * call.width;
    A* grad = grads.data;
    for (int64_t query = 0; query < count; ++query, from += row_width) {
      for (int64_t head = 0; head < heads; ++head, grad += padded) {
        load_row(from + head * call.width, grad_end, call.width, grad);
      }
    }
    grad = grads.data;
    for (int64_t query = 0, sample = 0; query < count; ++query) {
      prefetch_sampling(samples, first + samples.queries + query);
      prefetch(call.grad_output + (first + samples.queries + query) * row_width + first_head * call.width, size);
      for (int64_t head = 0; head < heads; ++head, sample += samples.per_head, grad += padded) {
        const int64_t rows = head * map.per_head;
        for_blocks<A>(
            padded, Scatter<T, A>{samples, sample, grad, map.rows.data + rows, grad_map.rows.data + rows});
      }
    }
    finish_gradients(samples, count * samples.per_query);
    write_block_gradients(samples, first, count);
  }
  unpack(grad_map, image, first_head, heads);
}

template <typename T>
PIIP_TARGET void run_forward(const Call<T>& call, int64_t begin, int64_t end) {
  const Map<T> map(call, call.heads_at_a_time);
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
  const Map<T> map(call, call.heads_at_a_time), grad_map(call, call.heads_at_a_time);
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
