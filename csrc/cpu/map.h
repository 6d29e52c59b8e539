// The value maps of a few heads in the layout that sampling reads, and the way back for their gradients.
// Included by kernel_impl.h inside its own namespace, see there.

// Widens rows of `width` elements into padded rows, zeros after them. Reads ahead, but nothing from `end` on; writes whole
// vectors of n, so perhaps more zeros than the padded row has.
template <typename T, int64_t n>
struct RowLoader {
  using A = typename Accumulate<T>::type;
  using V = Vec<A, n>;
  using Bits = decltype(V{} < V{});

  template <int... kLane>
  PIIP_INLINE RowLoader(int64_t width_, const T* end_, std::integer_sequence<int, kLane...>)
      : width(width_), last((width - 1) / n * n), end(end_), keep(V{kLane...} < static_cast<A>(width - last)) {}

  PIIP_INLINE void operator()(const T* from, A* to) const {
    for (int64_t channel = 0; channel < last; channel += n) {
      write(to + channel, load<n>(from + channel));
    }
    write(to + last, same_bits<V>(same_bits<Bits>(load_last(from + last)) & keep));
  }

  PIIP_INLINE V load_last(const T* from) const {
    if (__builtin_expect(n <= end - from, 1)) {
      return load<n>(from);
    }
    T copy[n] = {};
    for (int64_t lane = 0; lane < width - last; ++lane) {
      copy[lane] = from[lane];
    }
    return load<n>(copy);
  }

  const int64_t width, last;
  const T* const end;
  const Bits keep;
};

// Rounds the first `width` elements of a padded row to `to`. Overwrites what comes after, but nothing from `end` on.
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

// Some heads of one image. A pixel is a padded row of one head, a level lines of pixels with zeros around it (see
// packed_pixels): so a sample's four pixels exist wherever it lies, and sampling needs no branch.
template <typename T>
struct Map {
  using A = typename Accumulate<T>::type;

  Map(const Call<T>& call_, Block block)
      : call(call_),
        padded(padded_width(call.width)),
        per_head(pixels(call) * padded),
        own(bytes() > kKeptBytes ? size() : 0),
        rows(bytes() > kKeptBytes ? own.data : static_cast<A*>(kept_memory(block, bytes()))) {}

  // What is read and written in whole vectors may reach beyond the last row.
  int64_t size() const {
    return call.heads_at_a_time * per_head + kWide<A>;
  }

  int64_t bytes() const {
    return size() * static_cast<int64_t>(sizeof(A));
  }

  static int64_t pixels(const Call<T>& call) {
    int64_t sum = 0;
    for (int64_t level = 0; level < call.levels; ++level) {
      sum += packed_pixels(call.spatial_shapes[2 * level], call.spatial_shapes[2 * level + 1]);
    }
    return sum;
  }

  const Call<T>& call;
  const int64_t padded, per_head;  // floats from one pixel to the next, from one head to the next
  const Array<A> own;
  A* const rows;
};

// The cache lines of `size` elements, which are needed soon.
template <int kWrite = 0, typename U>
PIIP_INLINE void prefetch(const U* from, int64_t size) {
  for (const char* line = reinterpret_cast<const char*>(from); line < reinterpret_cast<const char*>(from + size);
       line += 64) {
    __builtin_prefetch(line, kWrite);
  }
}

// How many pixels ahead of packing or unpacking to prefetch: 12 KB of them, far enough for slow memory, and little
// enough for the L1 cache.
template <typename T>
int64_t pixels_ahead(int64_t channels) {
  return 12288 / (channels * static_cast<int64_t>(sizeof(T)) + 1) + 1;
}

template <typename A>
inline void clear(A* first, int64_t count) {
  __builtin_memset(first, 0, count * sizeof(A));
}

// Fills the map from the values of the heads from `first_head` on.
template <int64_t n, typename T>
PIIP_TARGET void pack_rows(const Map<T>& map, int64_t image, int64_t first_head, int64_t heads) {
  using A = typename Map<T>::A;
  const Call<T>& call = map.call;
  const int64_t row_width = call.heads * call.width, padded = map.padded;
  const RowLoader<T, n> load_row(call.width, call.value + call.batch * call.values * row_width, LanesUpTo<n>{});
  const T* from = call.value + image * call.values * row_width + first_head * call.width;
  const int64_t ahead = pixels_ahead<T>(heads * call.width);
  A* level_rows = map.rows;
  for (int64_t level = 0; level < call.levels; ++level) {
    const int64_t height = call.spatial_shapes[2 * level], width = call.spatial_shapes[2 * level + 1];
    const int64_t above = (width + 2) * padded, below = 2 * (width + 1) * padded;
    A* to = level_rows + above;
    for (int64_t head = 0; head < heads; ++head) {
      clear(to + head * map.per_head - above, above);
    }
    for (int64_t line = 0; line < height; ++line) {
      for (int64_t column = 0; column < width; ++column, from += row_width, to += padded) {
        prefetch(from + ahead * row_width, heads * call.width);
        for (int64_t head = 0; head < heads; ++head) {
          load_row(from + head * call.width, to + head * map.per_head);
        }
      }
      for (int64_t head = 0; head < heads; ++head) {
        clear(to + head * map.per_head, padded);
      }
      to += padded;
    }
    for (int64_t head = 0; head < heads; ++head) {
      clear(to + head * map.per_head, below);
    }
    level_rows += packed_pixels(height, width) * padded;
  }
}

template <typename T>
PIIP_TARGET void pack(const Map<T>& map, int64_t image, int64_t first_head, int64_t heads) {
  if (map.padded == kLanes) {
    pack_rows<kLanes>(map, image, first_head, heads);
  } else {
    pack_rows<kWide<typename Map<T>::A>>(map, image, first_head, heads);
  }
}

// Writes the gradient of the values from a map of gradients.
template <typename T>
PIIP_TARGET void unpack(const Map<T>& map, int64_t image, int64_t first_head, int64_t heads) {
  using A = typename Map<T>::A;
  const Call<T>& call = map.call;
  const int64_t row_width = call.heads * call.width, padded = map.padded;
  T* to = call.grad_value + image * call.values * row_width + first_head * call.width;
  const int64_t ahead = pixels_ahead<T>(heads * call.width);
  const A* level_rows = map.rows;
  for (int64_t level = 0; level < call.levels; ++level) {
    const int64_t height = call.spatial_shapes[2 * level], width = call.spatial_shapes[2 * level + 1];
    const A* from = level_rows + (width + 2) * padded;
    for (int64_t line = 0; line < height; ++line, from += padded) {
      for (int64_t column = 0; column < width; ++column, to += row_width, from += padded) {
        prefetch<1>(to + ahead * row_width, heads * call.width);
        for (int64_t head = 0; head < heads; ++head) {
          store_row(from + head * map.per_head, call.width, to + head * call.width, to + heads * call.width);
        }
      }
    }
    level_rows += packed_pixels(height, width) * padded;
  }
}
