// The value maps of a few heads in the layout that sampling reads, and the way back for their gradients.
// Included by kernel_impl.h inside its own namespace, see there.

// Widens `width` elements into a padded row, zeros behind. Reads ahead, but nothing from `end` on.
template <typename T, typename A>
PIIP_INLINE void load_row(const T* from, const T* end, int64_t width, A* to) {
  constexpr Vec<A> kLane{0, 1, 2, 3, 4, 5, 6, 7};
  int64_t channel = 0;
  for (; channel + kLanes <= width; channel += kLanes) {
    store(to + channel, load(from + channel));
  }
  if (channel == width) {
    return;
  }
  if (from + channel + kLanes <= end) {
    store(to + channel, kLane < static_cast<A>(width - channel) ? load(from + channel) : Vec<A>{});
  } else {
    T last[kLanes] = {};
    for (int64_t lane = 0; lane < width - channel; ++lane) {
      last[lane] = from[channel + lane];
    }
    store(to + channel, load(last));
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

// Some heads of one image. A pixel is a padded row of one head, a level lines of pixels with zeros around it (see
// packed_pixels): so a sample's four pixels exist wherever it lies, and sampling needs no branch.
template <typename T>
struct Map {
  using A = typename Accumulate<T>::type;

  Map(const Call<T>& call_, Block block)
      : call(call_),
        padded(padded_width(call.width)),
        per_head(pixels(call) * padded),
        own(bytes() > kKeptBytes ? call.heads_at_a_time * per_head : 0),
        rows(bytes() > kKeptBytes ? own.data : static_cast<A*>(kept_memory(block, bytes()))) {}

  int64_t bytes() const {
    return call.heads_at_a_time * per_head * static_cast<int64_t>(sizeof(A));
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
template <typename T>
PIIP_TARGET void pack(const Map<T>& map, int64_t image, int64_t first_head, int64_t heads) {
  using A = typename Map<T>::A;
  const Call<T>& call = map.call;
  const int64_t row_width = call.heads * call.width, padded = map.padded;
  const T* const value_end = call.value + call.batch * call.values * row_width;
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
          load_row(from + head * call.width, value_end, call.width, to + head * map.per_head);
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
