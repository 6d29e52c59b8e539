// A block of samples: reading them, where they lie, and their gradients. One lane per sample everywhere.
// Included by kernel_impl.h inside its own namespace, see there.

constexpr int64_t kBlock = 256;  // samples located at a time: enough to fill vectors, little enough for the L1 cache

// The samples that a few queries take with the heads [first_head, first_head + heads), as structure of arrays. The
// arrays have some elements more than samples, so that the last vector need not be full.
template <typename T>
struct Samples {
  using A = typename Accumulate<T>::type;
  static constexpr int64_t kSlack = 2 * kWide<A>;

  Samples(const Map<T>& map, int64_t first_head_, int64_t heads_)
      : call(map.call),
        first_head(first_head_),
        heads(heads_),
        padded(map.padded),
        per_head(call.levels * call.points),
        per_query(heads * per_head),
        queries(per_query >= kBlock ? 1 : per_query ? kBlock / per_query : kBlock),
        capacity((queries * per_query / kWide<A> + 1) * kWide<A> + kSlack),
        floats(16 * capacity),
        ints(3 * capacity) {
    clear(floats.data, 16 * capacity);
    clear(ints.data, 3 * capacity);
    for (int64_t sample = 0; sample < queries * per_query; ++sample) {
      const int64_t level = sample % per_head / call.points;
      int64_t pixel = 0;
      for (int64_t before = 0; before < level; ++before) {
        pixel += packed_pixels(call.spatial_shapes[2 * before], call.spatial_shapes[2 * before + 1]);
      }
      const int64_t height = call.spatial_shapes[2 * level], width = call.spatial_shapes[2 * level + 1];
      level_width[sample] = static_cast<A>(width);
      level_height[sample] = static_cast<A>(height);
      scale_x[sample] = call.sampling.grid ? A(1) : level_width[sample];
      scale_y[sample] = call.sampling.grid ? A(1) : level_height[sample];
      origin[sample] = static_cast<int32_t>(pixel * padded);
      line_step[sample] = static_cast<int32_t>((width + 1) * padded);
    }
  }

  const Call<T>& call;
  const int64_t first_head, heads, padded, per_head, per_query;
  const int64_t sampling_bytes = call.sampling.type == Type::kDouble ? 8 : call.sampling.type == Type::kFloat ? 4 : 2;
  const int64_t queries, capacity;  // so many queries, or samples and slack, in a block
  const Array<A> floats;
  const Array<int32_t> ints;
  // Of the sample's level: its size, what turns a location or an offset into pixels, where its zeros begin in the map,
  // from there to the next line.
  A* const level_width = floats.data;
  A* const level_height = floats.data + capacity;
  A* const scale_x = floats.data + 2 * capacity;
  A* const scale_y = floats.data + 3 * capacity;
  int32_t* const origin = ints.data;
  int32_t* const line_step = ints.data + capacity;
  // Position in pixels from the centre of the pixel of zeros above and left of the level's first one, so that no
  // position inside is negative; after locate() from the centre of the sample's upper left pixel; after
  // finish_gradients() its gradient:
  A* const x = floats.data + 4 * capacity;
  A* const y = floats.data + 5 * capacity;
  A* const weight = floats.data + 6 * capacity;
  A* const grad_weight = floats.data + 7 * capacity;
  // Four of each sample, for its pixels (top left, top right, bottom left, bottom right):
  A* const corner = floats.data + 8 * capacity;    // weight times bilinear factor
  A* const product = floats.data + 12 * capacity;  // backward: gradient of the output times value
  int32_t* const top = ints.data + 2 * capacity;  // where the upper left pixel is in the map
};

// The samples of a query in two arrays that are laid out as the call's sampling.
template <int kWrite = 0, typename T>
PIIP_INLINE void prefetch_samples(const Samples<T>& s, const void* locations, const void* weights, int64_t query) {
  const Sampling& sampling = s.call.sampling;
  const int64_t offset = s.first_head * s.per_head, bytes = s.sampling_bytes;
  prefetch<kWrite>(
      static_cast<const char*>(locations) + (query * sampling.locations_step + 2 * offset) * bytes,
      2 * s.per_query * bytes);
  prefetch<kWrite>(
      static_cast<const char*>(weights) + (query * sampling.weights_step + offset) * bytes, s.per_query * bytes);
}

// `from`, or where reading `ahead` elements would go beyond `end`, a copy of the first `size` in `buffer`.
template <typename U>
PIIP_INLINE const U* readable(const U* from, int64_t size, int64_t ahead, const U* end, U* buffer) {
  if (ahead <= end - from) {
    return from;
  }
  __builtin_memcpy(buffer, from, size * sizeof(U));
  return buffer;
}

// Reads positions and weights (or logits) of `count` queries from `first` on (counted over all images).
template <typename U, typename T>
PIIP_TARGET void read_samples(Samples<T>& s, int64_t first, int64_t count) {
  using A = typename Samples<T>::A;
  using V = Vec<A, kWide<A>>;
  const Call<T>& call = s.call;
  const int64_t all_queries = call.batch * call.queries, offset = s.first_head * s.per_head, size = s.per_query;
  const U* const locations = static_cast<const U*>(call.sampling.locations);
  const U* const weights = static_cast<const U*>(call.sampling.weights);
  const U* const weights_end = weights + (all_queries - 1) * call.sampling.weights_step + call.heads * s.per_head;
  const U* const locations_end =
      call.sampling.grid ? weights_end : locations + all_queries * call.sampling.locations_step;
  const int64_t ahead = (size + kWide<A> - 1) / kWide<A> * kWide<A>;
  U* const buffer = reinterpret_cast<U*>(s.corner);  // not in use yet
  const bool grid = call.sampling.grid;
  const A grid_width = static_cast<A>(call.sampling.grid_width);
  const A grid_height = static_cast<A>(call.sampling.grid_height);
  int64_t column = grid ? first % call.queries % call.sampling.grid_width : 0;
  int64_t line = grid ? first % call.queries / call.sampling.grid_width : 0;
  for (int64_t query = 0; query < count; ++query) {
    const U* location = locations + (first + query) * call.sampling.locations_step + 2 * offset;
    const U* weight = weights + (first + query) * call.sampling.weights_step + offset;
    location = readable(location, 2 * size, 2 * ahead, locations_end, buffer);
    weight = readable(weight, size, ahead, weights_end, buffer + 2 * s.capacity);
    // Of the reference point, in units of the level's size.
    const A centre_x = grid ? (static_cast<A>(column) + A(0.5)) / grid_width : A(0);
    const A centre_y = grid ? (static_cast<A>(line) + A(0.5)) / grid_height : A(0);
    if (grid && ++column == call.sampling.grid_width) {
      column = 0;
      ++line;
    }
    A *x = s.x + query * size, *y = s.y + query * size, *w = s.weight + query * size;
    for (int64_t i = 0; i < size; i += kWide<A>) {
      V vx, vy;
      split_pairs(
          load<kWide<A>>(location + 2 * i), load<kWide<A>>(location + 2 * i + kWide<A>), vx, vy, LanesUpTo<kWide<A>>{});
      write(x + i, vx * read<V>(s.scale_x + i) + (centre_x * read<V>(s.level_width + i) + A(0.5)));
      write(y + i, vy * read<V>(s.scale_y + i) + (centre_y * read<V>(s.level_height + i) + A(0.5)));
      write(w + i, load<kWide<A>>(weight + i));
    }
  }
}

template <typename T>
PIIP_TARGET void read_block(Samples<T>& s, int64_t first, int64_t count) {
  if constexpr (sizeof(T) == sizeof(double)) {
    read_samples<double>(s, first, count);
  } else if (s.call.sampling.type == Type::kFloat) {
    read_samples<float>(s, first, count);
  } else if (s.call.sampling.type == Type::kHalf) {
    read_samples<HalfBits>(s, first, count);
  } else {
    read_samples<BFloat16Bits>(s, first, count);
  }
  if (s.call.sampling.grid) {
    softmax(s.weight, count * s.per_query, s.per_head);
  }
}

// From positions to pixels, and the weights of the four. Free of branches, so that it vectorises.
template <typename T>
PIIP_TARGET void locate(Samples<T>& s, int64_t samples) {
  using A = typename Samples<T>::A;
  const A *level_width = s.level_width, *level_height = s.level_height, *weight = s.weight;
  const int32_t *origin = s.origin, *line_step = s.line_step;
  const int32_t padded = static_cast<int32_t>(s.padded);
  A *px = s.x, *py = s.y, *corner = s.corner;
  int32_t* top = s.top;
  PIIP_INDEPENDENT
  for (int64_t i = 0; i < samples; ++i) {
    A x = px[i], y = py[i];
    // Written so that NaN is outside. What is outside reads the zeros below the level.
    const bool inside = (x > A(0)) & (x < level_width[i] + A(1)) & (y > A(0)) & (y < level_height[i] + A(1));
    x = inside ? x : A(0);
    y = inside ? y : level_height[i] + A(1);
    const int32_t column = static_cast<int32_t>(x), line = static_cast<int32_t>(y);
    const A fx = x - static_cast<A>(column), fy = y - static_cast<A>(line);
    top[i] = origin[i] + line * line_step[i] + column * padded;
    const A lower = weight[i] * fy, upper = weight[i] - lower;
    const A upper_right = upper * fx, lower_right = lower * fx;
    corner[4 * i] = upper - upper_right;
    corner[4 * i + 1] = upper_right;
    corner[4 * i + 2] = lower - lower_right;
    corner[4 * i + 3] = lower_right;
    px[i] = fx;
    py[i] = fy;
  }
}

// From the products to the gradients of locations and weights, or of offsets and logits.
template <typename T>
PIIP_TARGET void finish_gradients(Samples<T>& s, int64_t samples) {
  using A = typename Samples<T>::A;
  const A *weight = s.weight, *product = s.product, *scale_x = s.scale_x, *scale_y = s.scale_y;
  A *x = s.x, *y = s.y, *grad_weight = s.grad_weight;
  PIIP_INDEPENDENT
  for (int64_t i = 0; i < samples; ++i) {
    const A p0 = product[4 * i], p1 = product[4 * i + 1], p2 = product[4 * i + 2], p3 = product[4 * i + 3];
    const A fx = x[i], fy = y[i], w = weight[i];
    const A upper = p0 + fx * (p1 - p0), lower = p2 + fx * (p3 - p2);
    x[i] = w * scale_x[i] * ((A(1) - fy) * (p1 - p0) + fy * (p3 - p2));
    y[i] = w * scale_y[i] * (lower - upper);
    grad_weight[i] = upper + fy * (lower - upper);
  }
  if (s.call.sampling.grid) {
    softmax_backward(s.weight, s.grad_weight, samples, s.per_head);
  }
}

// The reverse of read_samples.
template <typename U, typename T>
PIIP_TARGET void write_gradients(const Samples<T>& s, int64_t first, int64_t count) {
  using A = typename Samples<T>::A;
  using V = Vec<A, kWide<A>>;
  const Call<T>& call = s.call;
  const int64_t offset = s.first_head * s.per_head, size = s.per_query;
  A* const pairs = s.corner;  // no longer needed
  for (int64_t query = 0; query < count; ++query) {
    U* location = static_cast<U*>(call.grad_locations) + (first + query) * call.sampling.locations_step + 2 * offset;
    U* weight = static_cast<U*>(call.grad_weights) + (first + query) * call.sampling.weights_step + offset;
    const A *x = s.x + query * size, *y = s.y + query * size;
    for (int64_t i = 0; i < size; i += kWide<A>) {
      V a, b;
      join_pairs(read<V>(x + i), read<V>(y + i), a, b, LanesUpTo<kWide<A>>{});
      write(pairs + 2 * i, a);
      write(pairs + 2 * i + kWide<A>, b);
    }
    store_row(pairs, 2 * size, location, location + 2 * size);
    store_row(s.grad_weight + query * size, size, weight, weight + size);
  }
}

template <typename T>
PIIP_TARGET void write_block_gradients(const Samples<T>& s, int64_t first, int64_t count) {
  if constexpr (sizeof(T) == sizeof(double)) {
    write_gradients<double>(s, first, count);
  } else if (s.call.sampling.type == Type::kFloat) {
    write_gradients<float>(s, first, count);
  } else if (s.call.sampling.type == Type::kHalf) {
    write_gradients<HalfBits>(s, first, count);
  } else {
    write_gradients<BFloat16Bits>(s, first, count);
  }
}
