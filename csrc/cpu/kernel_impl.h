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

// One query and head, whose samples begin at `first`: sums the samples, in kCount vectors V of channels.
template <typename V, int kCount, typename A>
PIIP_INLINE void gather(
    const A* corner,
    const int32_t* top,
    const int32_t* bottom,
    int64_t samples,
    const A* rows,
    int64_t padded,
    A* sum) {
  constexpr int64_t kLane = sizeof(V) / sizeof(A);
  V left[kCount] = {}, right[kCount] = {};
  for (int64_t i = 0; i < samples; ++i) {
    const A *upper = rows + top[i], *lower = rows + bottom[i];
    for (int j = 0; j < kCount; ++j) {
      left[j] += corner[4 * i] * read<V>(upper + j * kLane);
      right[j] += corner[4 * i + 1] * read<V>(upper + padded + j * kLane);
      left[j] += corner[4 * i + 2] * read<V>(lower + j * kLane);
      right[j] += corner[4 * i + 3] * read<V>(lower + padded + j * kLane);
    }
  }
  for (int j = 0; j < kCount; ++j) {
    write(sum + j * kLane, left[j] + right[j]);
  }
}

// The reverse for kSamples samples from `first` on: spreads the gradient over their pixels, and adds up the products of
// gradient and value, from which the gradients of locations and weights follow.
template <int kSamples, typename V, int kCount, typename T, typename A>
PIIP_INLINE void scatter(
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

// Goes through the channels of a padded row in blocks that fit into registers, of the longest vectors and at the end
// one of kLanes. That one comes first: what it writes beyond a row is then overwritten by the next row's beginning.
template <typename A, typename F>
PIIP_INLINE void for_blocks(int64_t padded, const F& f) {
  using Wide = Vec<A, kWide<A>>;
  int64_t channel = padded / kWide<A> * kWide<A>;
  const bool narrow = channel < padded;
  if (narrow) {
    f.template run<Vec<A>, 1>(channel, false);
  }
  const int64_t left = channel / kWide<A> % 4;
  channel -= left * kWide<A>;
  if (left == 1) {
    f.template run<Wide, 1>(channel, narrow);
  } else if (left == 2) {
    f.template run<Wide, 2>(channel, narrow);
  } else if (left == 3) {
    f.template run<Wide, 3>(channel, narrow);
  }
  while (channel > 0) {
    channel -= 4 * kWide<A>;
    f.template run<Wide, 4>(channel, narrow || left > 0 || channel + 4 * kWide<A> < padded);
  }
}

// A block of samples: `queries` queries and all their heads.
template <typename T, typename A>
struct Gather {
  const Samples<T>& s;
  const Map<T>& map;
  int64_t queries;
  A* sums;  // queries x heads x width

  template <typename V, int kCount>
  PIIP_INLINE void run(int64_t channel, bool) const {
    if (s.per_head == 4) {  // worth a loop that the compiler can unroll
      run_of<V, kCount, 4>(channel);
    } else {
      run_of<V, kCount, 0>(channel);
    }
  }

  template <typename V, int kCount, int kPerHead>
  PIIP_INLINE void run_of(int64_t channel) const {
    const int64_t samples = kPerHead ? kPerHead : s.per_head, padded = s.padded, width = s.call.width;
    const int32_t *top = s.top, *bottom = s.bottom;
    const A* corner = s.corner;
    A* sum = sums + channel;
    for (int64_t query = 0; query < queries; ++query) {
      const A* rows = map.rows + channel;
      for (int64_t head = 0; head < s.heads; ++head, rows += map.per_head, sum += width) {
        gather<V, kCount>(corner, top, bottom, samples, rows, padded, sum);
        corner += 4 * samples;
        top += samples;
        bottom += samples;
      }
    }
  }
};

template <typename T, typename A>
struct Scatter {
  const Samples<T>& s;
  const Map<T>& map;
  const Map<T>& grad_map;
  int64_t queries;
  const A* grads;  // queries x heads x padded

  template <typename V, int kCount>
  PIIP_INLINE void run(int64_t channel, bool add) const {
    const A* grad = grads + channel;
    int64_t sample = 0;
    for (int64_t query = 0; query < queries; ++query) {
      const A* rows = map.rows + channel;
      A* grad_rows = grad_map.rows + channel;
      for (int64_t head = 0; head < s.heads; ++head) {
        V vectors[kCount];
        for (int j = 0; j < kCount; ++j) {
          vectors[j] = read<V>(grad + j * static_cast<int64_t>(sizeof(V) / sizeof(A)));
        }
        const int64_t last = sample + s.per_head;
        for (; sample + 2 <= last; sample += 2) {
          scatter<2>(s, sample, vectors, rows, grad_rows, add);
        }
        for (; sample < last; ++sample) {
          scatter<1>(s, sample, vectors, rows, grad_rows, add);
        }
        grad += s.padded;
        rows += map.per_head;
        grad_rows += map.per_head;
      }
    }
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
    for (int64_t query = 0; query < count; ++query) {
      prefetch_sampling(samples, first + samples.queries + query);
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
  const int64_t row_width = call.heads * call.width, size = heads * call.width, padded = map.padded;
  const int64_t end = (image + 1) * call.queries;
  const T* const grad_end = call.grad_output + call.batch * call.queries * row_width;
  clear(grad_map.rows, heads * grad_map.per_head);
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
    for (int64_t query = 0; query < count; ++query) {
      prefetch_sampling(samples, first + samples.queries + query);
      prefetch(call.grad_output + (first + samples.queries + query) * row_width + first_head * call.width, size);
    }
    for_blocks<A>(padded, Scatter<T, A>{samples, map, grad_map, count, grads.data});
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
