// Reading the pixels of located samples, and spreading gradients over them. One lane per channel everywhere.
// Included by kernel_impl.h inside its own namespace, see there.

// Adds a sample to the sums of a query and head, kCount vectors V of channels. `pixels` are the first four pixels of the
// level (top left, top right, bottom left, bottom right), `sample` leads from there to the sample's. With kPair a vector
// holds two neighbouring pixels, each half as long, and so does the sum.
template <bool kPair, typename V, int kCount, typename A>
PIIP_INLINE void gather(
    const A* corner, const A* const (&pixels)[4], int64_t sample, V (&upper)[kCount], V (&lower)[kCount]) {
  constexpr int64_t kLane = sizeof(V) / sizeof(A);
  if constexpr (kPair) {
    constexpr LanesUpTo<kLane> lanes;
    upper[0] += part_pairs(repeat_pair<V>(corner), lanes) * read<V>(pixels[0] + sample);
    lower[0] += part_pairs(repeat_pair<V>(corner + 2), lanes) * read<V>(pixels[2] + sample);
    return;
  }
  V weights[4];
  repeat_each(corner, weights);
  for (int j = 0; j < kCount; ++j) {
    upper[j] += weights[0] * read<V>(pixels[0] + sample + j * kLane);
    lower[j] += weights[2] * read<V>(pixels[2] + sample + j * kLane);
    upper[j] += weights[1] * read<V>(pixels[1] + sample + j * kLane);
    lower[j] += weights[3] * read<V>(pixels[3] + sample + j * kLane);
  }
}

// In what products of vectors of kLane lanes are added up: the longest vectors that can be shuffled.
template <typename A, int64_t kLane>
using Partial = Vec<A, kOneRegister<A> ? kLane : kLanes / 2>;

// The reverse for kSamples samples from `sample` on: spreads the gradient over their pixels, and adds up the products
// of gradient and value, from which the gradients of locations and weights follow.
template <int kSamples, bool kPair, typename V, int kCount, typename T, typename A>
PIIP_INLINE void scatter(
    const Samples<T>& s, int64_t sample, const V (&grad)[kCount], const A* rows, A* grad_rows, bool add) {
  constexpr int64_t kLane = sizeof(V) / sizeof(A);
  using P = Partial<A, kLane>;
  P products[(kPair ? 2 : 4) * kSamples];
  for (int i = 0; i < kSamples; ++i) {
    const A* corner = s.corner + 4 * (sample + i);
    const int64_t top = s.top[sample + i], bottom = top + s.line_step[sample + i];
    if constexpr (kPair) {
      products[2 * i] = grad[0] * read<V>(rows + top);
      products[2 * i + 1] = grad[0] * read<V>(rows + bottom);
      const int64_t pixels[4] = {top, top + kLanes, bottom, bottom + kLanes};
      for (int k = 0; k < 4; ++k) {
        A* grad_row = grad_rows + pixels[k];
        write(grad_row, read<Vec<A>>(grad_row) + corner[k] * read<Vec<A>>(grad));
      }
    } else {
      V weights[4];
      repeat_each(corner, weights);
      const int64_t pixels[4] = {top, top + s.padded, bottom, bottom + s.padded};
      for (int k = 0; k < 4; ++k) {
        const A* row = rows + pixels[k];
        A* grad_row = grad_rows + pixels[k];
        V product = grad[0] * read<V>(row);
        for (int j = 0; j < kCount; ++j) {
          if (j > 0) {
            product += grad[j] * read<V>(row + j * kLane);
          }
          write(grad_row + j * kLane, read<V>(grad_row + j * kLane) + weights[k] * grad[j]);
        }
        products[4 * i + k] = fold_to<P>(product);
      }
    }
  }
  constexpr int kSums = sizeof(P) / sizeof(A);
  P sums = sum_lanes<(kPair ? kSums / 2 : kSums)>(products);
  if constexpr (kPair) {  // those of left pixels are in the lower half, those of right pixels in the upper
    sums = join_halves(sums, LanesUpTo<kSums>{});
  }
  A* product = s.product + 4 * sample;
  if (add) {
    sums += read<P>(product);
  }
  write(product, read<Vec<A, 4 * kSamples>>(&sums));
}

// Goes through `count` vectors of kLane channels in blocks that fit into registers: up to four. The last one comes first:
// what it writes beyond a row is then overwritten by the next row's beginning.
template <int64_t kLane, typename F>
PIIP_INLINE void for_vectors(int64_t count, const F& f) {
  const int64_t last = (count - 1) % 4 + 1;
  count -= last;
  switch (last) {
    case 1:
      f.template run<1, kLane>(count * kLane, false);
      break;
    case 2:
      f.template run<2, kLane>(count * kLane, false);
      break;
    case 3:
      f.template run<3, kLane>(count * kLane, false);
      break;
    default:
      f.template run<4, kLane>(count * kLane, false);
  }
  while (count > 0) {
    count -= 4;
    f.template run<4, kLane>(count * kLane, true);
  }
}

// Goes through the channels of a padded row in vectors as long as it is a multiple of. A row of half a vector is one
// vector with a pair of pixels.
template <typename A, typename F>
PIIP_INLINE void for_blocks(int64_t padded, const F& f) {
  if constexpr (kWide<A> > kLanes) {
    if (padded % kWide<A> == 0) {
      return for_vectors<kWide<A>>(padded / kWide<A>, f);
    }
    if (padded == kLanes) {
      return f.template run<1, kWide<A>, true>(0, false);
    }
  }
  for_vectors<kLanes>(padded / kLanes, f);
}

// A block of samples: `queries` queries and all their heads.
template <typename T, typename A>
struct Gather {
  const Samples<T>& s;
  const Map<T>& map;
  int64_t queries;
  A* sums;  // queries x heads x width

  template <int kCount, int64_t kLane, bool kPair = false>
  PIIP_INLINE void run(int64_t channel, bool) const {
    if (s.per_head == 4 && s.call.levels == 1) {  // worth a loop that the compiler can unroll
      run_of<kCount, kLane, kPair, 4>(channel);
    } else {
      run_of<kCount, kLane, kPair, 0>(channel);
    }
  }

  template <int kCount, int64_t kLane, bool kPair, int kPoints>
  PIIP_INLINE void run_of(int64_t channel) const {
    using V = Vec<A, kLane>;
    const int64_t points = kPoints ? kPoints : s.call.points, levels = kPoints ? 1 : s.call.levels;
    const int64_t padded = s.padded;
    const int32_t* top = s.top;
    const A* corner = s.corner;
    A* sum = sums + channel;
    for (int64_t query = 0; query < queries; ++query) {
      const A* rows = map.rows + channel;
      for (int64_t head = 0; head < s.heads; ++head, rows += map.per_head, sum += s.call.width) {
        V upper[kCount] = {}, lower[kCount] = {};
        for (int64_t level = 0; level < levels; ++level) {
          const A* const below = rows + s.line_step[level * points];
          const A* const pixels[4] = {rows, rows + padded, below, below + padded};
          for (int64_t point = 0; point < points; ++point, corner += 4, ++top) {
            gather<kPair>(corner, pixels, *top, upper, lower);
          }
        }
        if constexpr (kPair) {
          write(sum, fold_to<Vec<A>>(upper[0] + lower[0]));
          continue;
        }
        for (int j = 0; j < kCount; ++j) {
          write(sum + j * kLane, upper[j] + lower[j]);
        }
      }
    }
  }
};

template <typename T, typename A>
struct Scatter {
  const Samples<T>& s;
  const Map<T>& map;
  const Map<T>& grad_map;
  int64_t first, queries;
  const A* grads;  // queries x heads x padded

  template <int kCount, int64_t kLane, bool kPair = false>
  PIIP_INLINE void run(int64_t channel, bool add) const {
    using V = Vec<A, kLane>;
    constexpr int kFilling = sizeof(Partial<A, kLane>) / sizeof(A) / 4;  // as many as fill it, if there are registers
    constexpr int kSamples = kCount > 1 && kFilling > 2 ? 2 : kFilling;
    const A* grad = grads + channel;
    int64_t sample = 0;
    for (int64_t query = 0; query < queries; ++query) {
      const A* rows = map.rows + channel;
      A* grad_rows = grad_map.rows + channel;
      if (!add) {
        prefetch_backward(first + query);
      }
      for (int64_t head = 0; head < s.heads; ++head) {
        V vectors[kCount];
        for (int j = 0; j < kCount; ++j) {
          vectors[j] = read<V>(grad + j * kLane);
        }
        if constexpr (kPair) {
          vectors[0] = repeat_half(vectors[0], LanesUpTo<kLane>{});
        }
        const int64_t last = sample + s.per_head;
        for (; sample + kSamples <= last; sample += kSamples) {
          scatter<kSamples, kPair>(s, sample, vectors, rows, grad_rows, add);
        }
        for (; sample < last; ++sample) {
          scatter<1, kPair>(s, sample, vectors, rows, grad_rows, add);
        }
        grad += s.padded;
        rows += map.per_head;
        grad_rows += map.per_head;
      }
    }
  }

  // What will be written of this query, and read of the one that takes its place in the next block. A few lines at a
  // time: all at once are more than a core keeps track of.
  PIIP_INLINE void prefetch_backward(int64_t query) const {
    const Call<T>& call = s.call;
    const int64_t next = query + s.queries;
    prefetch_samples<1>(s, call.grad_locations, call.grad_weights, query);
    prefetch_samples(s, call.sampling.locations, call.sampling.weights, next);
    prefetch(call.grad_output + (next * call.heads + s.first_head) * call.width, s.heads * call.width);
  }
};
