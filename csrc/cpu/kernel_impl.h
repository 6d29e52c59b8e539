// The CPU kernels. Compiled once per instruction set by kernel_<capability>.cpp, which define
//   PIIP_CAPABILITY  the namespace of this copy
//   PIIP_TARGET      the function attribute that selects the instruction set
// All but the entry points is in an unnamed namespace, so copies cannot be mixed up by the linker.
//
// How it works. Widths per head are small and odd (6, 12, 24, 40), so the values are first packed: head by head, into
// rows of float padded to a multiple of eight channels. Every access is then a full vector, 16-bit types are widened
// once instead of at each of the many reads, and neighbouring pixels share cache lines. One more row of zeros per head
// stands for everything outside the map: a corner that falls outside points there, and sampling needs no branch.
// Samples are taken in memory order. Rows, fractions and corner weights of a block of them are computed together, one
// lane per sample; then the samples are gathered one by one, eight channels per instruction.
#include <cstdint>
#include <new>

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

#include "cpu/vector.h"
#include "cpu/samples.h"

// Widens `width` elements into a padded row, zeros behind. Reads ahead, but nothing from `end` on.
template <typename T, typename A>
PIIP_INLINE void load_row(const T* from, const T* end, int64_t width, A* to) {
  int64_t channel = 0;
  for (; channel + kLanes <= width; channel += kLanes) {
    store(to + channel, load(from + channel));
  }
  if (channel == width) {
    return;
  }
  if (from + channel + kLanes <= end) {
    store(to + channel, load(from + channel));
  } else {
    T last[kLanes] = {};
    for (int64_t lane = 0; lane < width - channel; ++lane) {
      last[lane] = from[channel + lane];
    }
    store(to + channel, load(last));
  }
  for (int64_t lane = width - channel; lane < kLanes; ++lane) {
    to[channel + lane] = 0;
  }
}

// Rounds the first `width` elements of a padded row to `to`. Overwrites what lies behind, but nothing from `end` on.
template <typename T, typename A>
PIIP_INLINE void store_row(const A* from, int64_t width, T* to, const T* end) {
  int64_t channel = 0;
  for (; channel < width && to + channel + kLanes <= end; channel += kLanes) {
    store(to + channel, load(from + channel));
  }
  if (channel < width) {
    T last[kLanes];
    store(last, load(from + channel));
    for (int64_t lane = 0; lane < width - channel; ++lane) {
      to[channel + lane] = last[lane];
    }
  }
}

// One query and head, whose samples begin at `first`: sums the samples of one head's packed rows.
template <typename T, typename A>
PIIP_INLINE void gather(const Samples<T>& s, int64_t first, const A* rows, int64_t padded, A* sum) {
  const A *c0 = s.corner[0], *c1 = s.corner[1], *c2 = s.corner[2], *c3 = s.corner[3];
  const int32_t *r0 = s.row[0], *r1 = s.row[1], *r2 = s.row[2], *r3 = s.row[3];
  for (int64_t channel = 0; channel < padded; channel += kLanes) {
    Vec<A> sum0{}, sum1{}, sum2{}, sum3{};
    for (int64_t i = first; i < first + s.per_head; ++i) {
      sum0 += c0[i] * load(rows + r0[i] * padded + channel);
      sum1 += c1[i] * load(rows + r1[i] * padded + channel);
      sum2 += c2[i] * load(rows + r2[i] * padded + channel);
      sum3 += c3[i] * load(rows + r3[i] * padded + channel);
    }
    store(sum + channel, (sum0 + sum1) + (sum2 + sum3));
  }
}

// The reverse of gather: spreads the gradient of one query and head over the corners of its samples, and keeps the
// products of gradient and value, from which the gradients of locations and weights follow.
template <typename T, typename A>
PIIP_INLINE void scatter(
    const Samples<T>& s, int64_t first, const A* grad, const A* rows, A* grad_rows, int64_t padded) {
  A* const corner[4] = {s.corner[0], s.corner[1], s.corner[2], s.corner[3]};
  A* const product[4] = {s.product[0], s.product[1], s.product[2], s.product[3]};
  const int32_t* const row[4] = {s.row[0], s.row[1], s.row[2], s.row[3]};
  const int64_t last = first + s.per_head;
  for (int64_t i = first; i < last; ++i) {
    Vec<A> products[4] = {};
    for (int64_t channel = 0; channel < padded; channel += kLanes) {
      const Vec<A> g = load(grad + channel);
      for (int k = 0; k < 4; ++k) {
        const int64_t offset = row[k][i] * padded + channel;
        products[k] += g * load(rows + offset);
        store(grad_rows + offset, load(grad_rows + offset) + corner[k][i] * g);
      }
    }
    A sums[4];
    sum_lanes<A>(products, sums);
    for (int k = 0; k < 4; ++k) {
      product[k][i] = sums[k];
    }
  }
}

template <typename T>
PIIP_TARGET void run_pack(const Call<T>& call, int64_t begin, int64_t end) {
  using A = typename Call<T>::A;
  const int64_t padded = padded_width(call.width), row_width = call.heads * call.width;
  const int64_t per_head = (call.values + 1) * padded;
  const T* value_end = call.value + call.batch * call.values * row_width;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / (call.values + 1), row = index % (call.values + 1);
    const T* from = call.value + (image * call.values + row) * row_width;
    A* to = call.rows + image * call.heads * per_head + row * padded;
    for (int64_t head = 0; head < call.heads; ++head, from += call.width, to += per_head) {
      if (row < call.values) {
        load_row(from, value_end, call.width, to);
      } else {
        __builtin_memset(to, 0, padded * sizeof(A));
      }
    }
  }
}

// The heads [first_head, first_head + heads) of the queries [begin, end), all of one image.
template <typename T>
PIIP_TARGET void forward_heads(const Call<T>& call, int64_t begin, int64_t end, int64_t first_head, int64_t heads) {
  using A = typename Call<T>::A;
  const int64_t padded = padded_width(call.width), per_head = (call.values + 1) * padded;
  const A* rows = call.rows + (begin / call.queries * call.heads + first_head) * per_head;
  Samples<T> samples(call, first_head, heads);
  Array<A> sum(padded);
  for (int64_t first = begin; first < end; first += samples.queries) {
    const int64_t count = least(end - first, samples.queries);
    read_samples(samples, first, count);
    locate(samples, count * samples.per_query);
    for (int64_t query = 0; query < count; ++query) {
      T* output = call.output + ((first + query) * call.heads + first_head) * call.width;
      for (int64_t head = 0; head < heads; ++head) {
        gather(samples, query * samples.per_query + head * samples.per_head, rows + head * per_head, padded, sum.data);
        store_row(sum.data, call.width, output + head * call.width, output + heads * call.width);
      }
    }
  }
}

// The heads [first_head, first_head + heads) of one image.
template <typename T>
PIIP_TARGET void backward_heads(const Call<T>& call, int64_t image, int64_t first_head, int64_t heads) {
  using A = typename Call<T>::A;
  const int64_t padded = padded_width(call.width), per_head = (call.values + 1) * padded;
  const int64_t row_width = call.heads * call.width, first_channel = first_head * call.width;
  const A* rows = call.rows + (image * call.heads + first_head) * per_head;
  A* grad_rows = call.grad_rows + (image * call.heads + first_head) * per_head;
  __builtin_memset(grad_rows, 0, heads * per_head * sizeof(A));
  const T* grad_end = call.grad_output + call.batch * call.queries * row_width;
  Samples<T> samples(call, first_head, heads);
  Array<A> grad(padded);
  const int64_t end = (image + 1) * call.queries;
  for (int64_t first = image * call.queries; first < end; first += samples.queries) {
    const int64_t count = least(end - first, samples.queries);
    read_samples(samples, first, count);
    locate(samples, count * samples.per_query);
    for (int64_t query = 0; query < count; ++query) {
      const T* grad_output = call.grad_output + (first + query) * row_width + first_channel;
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t sample = query * samples.per_query + head * samples.per_head;
        load_row(grad_output + head * call.width, grad_end, call.width, grad.data);
        scatter(samples, sample, grad.data, rows + head * per_head, grad_rows + head * per_head, padded);
      }
    }
    finish_gradients(samples, count * samples.per_query);
    write_gradients(samples, first, count);
  }
  T* grad_value = call.grad_value + image * call.values * row_width + first_channel;
  for (int64_t row = 0; row < call.values; ++row, grad_value += row_width) {
    for (int64_t head = 0; head < heads; ++head) {
      const A* from = grad_rows + head * per_head + row * padded;
      store_row(from, call.width, grad_value + head * call.width, grad_value + heads * call.width);
    }
  }
}

// One query after the other reads from a band of the map around it. Few heads at a time keep their bands in the cache;
// enough of them that their samples fill a cache line (16 floats), or every line would be fetched more than once.
template <typename T>
int64_t heads_at_a_time(const Call<T>& call) {
  const int64_t per_head = call.levels * call.points;
  return per_head == 0 || per_head >= 16 ? 1 : 16 / per_head;
}

}  // namespace

// The entry points are without PIIP_TARGET: an explicit instantiation would not take it from the definition.
template <typename T>
void pack(const Call<T>& call, int64_t begin, int64_t end) {
  run_pack(call, begin, end);
}

template <typename T>
void forward(const Call<T>& call, int64_t begin, int64_t end) {
  const int64_t group = heads_at_a_time(call);
  while (begin < end) {
    const int64_t next_image = (begin / call.queries + 1) * call.queries, stop = least(end, next_image);
    for (int64_t head = 0; head < call.heads; head += group) {
      forward_heads(call, begin, stop, head, least(group, call.heads - head));
    }
    begin = stop;
  }
}

template <typename T>
void backward(const Call<T>& call, int64_t begin, int64_t end) {
  const int64_t group = heads_at_a_time(call);
  while (begin < end) {
    const int64_t image = begin / call.heads, head = begin % call.heads;
    const int64_t heads = least(group, least(end - begin, call.heads - head));
    backward_heads(call, image, head, heads);
    begin += heads;
  }
}

#define PIIP_INSTANTIATE(T)                                      \
  template void pack<T>(const Call<T>&, int64_t, int64_t);       \
  template void forward<T>(const Call<T>&, int64_t, int64_t);    \
  template void backward<T>(const Call<T>&, int64_t, int64_t);
PIIP_INSTANTIATE(double)
PIIP_INSTANTIATE(float)
PIIP_INSTANTIATE(HalfBits)
PIIP_INSTANTIATE(BFloat16Bits)
#undef PIIP_INSTANTIATE

}  // namespace piip::cpu::PIIP_CAPABILITY
