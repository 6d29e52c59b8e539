// A block of samples: reading them, where they lie, and their gradients. One lane per sample everywhere.
// Included by kernel_impl.h inside its own namespace, see there.

constexpr int64_t kBlock = 256;  // samples located at a time: enough to fill vectors, little enough for the L1 cache

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

// The samples that a few queries take with the heads [first_head, first_head + heads), as structure of arrays.
template <typename T>
struct Samples {
  using A = typename Call<T>::A;

  Samples(const Call<T>& call_, int64_t first_head_, int64_t heads_)
      : call(call_),
        first_head(first_head_),
        heads(heads_),
        per_head(call.levels * call.points),
        per_query(heads * per_head),
        queries(per_query >= kBlock ? 1 : per_query ? kBlock / per_query : kBlock),
        capacity(queries * per_query),
        floats(13 * capacity),
        ints(7 * capacity) {
    for (int i = 0; i < 4; ++i) {
      corner[i] = floats.data + (5 + i) * capacity;
      product[i] = floats.data + (9 + i) * capacity;
      row[i] = ints.data + (3 + i) * capacity;
    }
    for (int64_t sample = 0; sample < capacity; ++sample) {
      const int64_t level = sample % per_head / call.points;
      int64_t first = 0;
      for (int64_t before = 0; before < level; ++before) {
        first += call.spatial_shapes[2 * before] * call.spatial_shapes[2 * before + 1];
      }
      start[sample] = static_cast<int32_t>(first);
      level_height[sample] = lines[sample] = static_cast<int32_t>(call.spatial_shapes[2 * level]);
      level_width[sample] = columns[sample] = static_cast<int32_t>(call.spatial_shapes[2 * level + 1]);
    }
  }

  // Where the samples of one query (of all images) begin in tensors that have one element per sample.
  int64_t offset(int64_t query) const {
    return (query * call.heads + first_head) * per_head;
  }

  const Call<T>& call;
  const int64_t first_head, heads, per_head, per_query;
  const int64_t queries, capacity;  // so many queries, or samples, in a block
  const Array<A> floats;
  const Array<int32_t> ints;
  // Of the sample's level:
  A* const level_width = floats.data;
  A* const level_height = floats.data + capacity;
  int32_t* const columns = ints.data;
  int32_t* const lines = ints.data + capacity;
  int32_t* const start = ints.data + 2 * capacity;
  // Normalised location, after locate() the fractions within the pixel, after finish_gradients() its gradient:
  A* const x = floats.data + 2 * capacity;
  A* const y = floats.data + 3 * capacity;
  // Attention weight, after finish_gradients() its gradient:
  A* const weight = floats.data + 4 * capacity;
  // Of the four corners (top left, top right, bottom left, bottom right):
  A* corner[4];     // weight times bilinear factor
  A* product[4];    // backward: gradient of the output times value
  int32_t* row[4];  // which packed row
};

// Copies locations and weights of `count` queries from `first` on (counted over all images).
template <typename T>
PIIP_TARGET void read_samples(Samples<T>& s, int64_t first, int64_t count) {
  using A = typename Call<T>::A;
  for (int64_t query = 0; query < count; ++query) {
    const A* location = s.call.locations + 2 * s.offset(first + query);
    const A* weight = s.call.weights + s.offset(first + query);
    A* x = s.x + query * s.per_query;
    A* y = s.y + query * s.per_query;
    A* w = s.weight + query * s.per_query;
    PIIP_INDEPENDENT
    for (int64_t sample = 0; sample < s.per_query; ++sample) {
      x[sample] = location[2 * sample];
      y[sample] = location[2 * sample + 1];
      w[sample] = weight[sample];
    }
  }
}

// From locations to rows, fractions and weights of the four corners. Free of branches, so that it vectorises.
template <typename T>
PIIP_TARGET void locate(Samples<T>& s, int64_t samples) {
  using A = typename Call<T>::A;
  const int32_t outside = static_cast<int32_t>(s.call.values);
  const A* level_width = s.level_width;
  const A* level_height = s.level_height;
  const A* weight = s.weight;
  const int32_t* columns = s.columns;
  const int32_t* lines = s.lines;
  const int32_t* start = s.start;
  A *px = s.x, *py = s.y;
  A *c0 = s.corner[0], *c1 = s.corner[1], *c2 = s.corner[2], *c3 = s.corner[3];
  int32_t *r0 = s.row[0], *r1 = s.row[1], *r2 = s.row[2], *r3 = s.row[3];
  PIIP_INDEPENDENT
  for (int64_t i = 0; i < samples; ++i) {
    A x = px[i] * level_width[i] - A(0.5);
    A y = py[i] * level_height[i] - A(0.5);
    // Written so that NaN is outside. What is outside moves to 0, where the conversion to integers is defined.
    const bool inside = (x > A(-1)) & (x < level_width[i]) & (y > A(-1)) & (y < level_height[i]);
    x = inside ? x : A(0);
    y = inside ? y : A(0);
    int32_t column = static_cast<int32_t>(x), line = static_cast<int32_t>(y);
    column -= static_cast<A>(column) > x;  // floor
    line -= static_cast<A>(line) > y;
    const A fx = x - static_cast<A>(column), fy = y - static_cast<A>(line);
    const bool left = inside & (column >= 0), right = inside & (column + 1 < columns[i]);
    const bool top = line >= 0, bottom = line + 1 < lines[i];
    const int32_t row = start[i] + line * columns[i] + column;
    r0[i] = (left & top) ? row : outside;
    r1[i] = (right & top) ? row + 1 : outside;
    r2[i] = (left & bottom) ? row + columns[i] : outside;
    r3[i] = (right & bottom) ? row + columns[i] + 1 : outside;
    const A upper = weight[i] * (A(1) - fy), lower = weight[i] * fy;
    c0[i] = upper * (A(1) - fx);
    c1[i] = upper * fx;
    c2[i] = lower * (A(1) - fx);
    c3[i] = lower * fx;
    px[i] = fx;
    py[i] = fy;
  }
}

// From the products to the gradients of locations and weights.
template <typename T>
PIIP_TARGET void finish_gradients(Samples<T>& s, int64_t samples) {
  using A = typename Call<T>::A;
  A *weight = s.weight, *x = s.x, *y = s.y;
  const A *p0 = s.product[0], *p1 = s.product[1];
  const A *p2 = s.product[2], *p3 = s.product[3];
  const A *level_width = s.level_width, *level_height = s.level_height;
  PIIP_INDEPENDENT
  for (int64_t i = 0; i < samples; ++i) {
    const A fx = x[i], fy = y[i];
    const A upper = p0[i] + fx * (p1[i] - p0[i]), lower = p2[i] + fx * (p3[i] - p2[i]);
    x[i] = weight[i] * level_width[i] * ((A(1) - fy) * (p1[i] - p0[i]) + fy * (p3[i] - p2[i]));
    y[i] = weight[i] * level_height[i] * (lower - upper);
    weight[i] = upper + fy * (lower - upper);
  }
}

// The reverse of read_samples.
template <typename T>
PIIP_TARGET void write_gradients(const Samples<T>& s, int64_t first, int64_t count) {
  using A = typename Call<T>::A;
  for (int64_t query = 0; query < count; ++query) {
    A* location = s.call.grad_locations + 2 * s.offset(first + query);
    A* weight = s.call.grad_weights + s.offset(first + query);
    const A* x = s.x + query * s.per_query;
    const A* y = s.y + query * s.per_query;
    const A* w = s.weight + query * s.per_query;
    PIIP_INDEPENDENT
    for (int64_t sample = 0; sample < s.per_query; ++sample) {
      location[2 * sample] = x[sample];
      location[2 * sample + 1] = y[sample];
      weight[sample] = w[sample];
    }
  }
}
