// Softmax over groups of neighbouring samples: those that a query takes with one head, from all levels.
// Included by kernel_impl.h inside its own namespace, see there.

struct Larger {
  template <typename V>
  static PIIP_INLINE V of(V a, V b) {
    return a > b ? a : b;
  }
};
struct Sum {
  template <typename V>
  static PIIP_INLINE V of(V a, V b) {
    return a + b;
  }
};

// Combines each group of four lanes; all lanes of the group have the result.
template <typename Op, typename A>
PIIP_INLINE Vec<A, kWide<A>> across_fours(Vec<A, kWide<A>> v) {
  constexpr LanesUpTo<kWide<A>> lanes;
  v = Op::of(v, swap_lanes<1>(v, lanes));
  return Op::of(v, swap_lanes<2>(v, lanes));
}

template <typename A>
PIIP_TARGET void softmax_of_fours(A* x, int64_t size) {
  using V = Vec<A, kWide<A>>;
  for (int64_t i = 0; i < size; i += kWide<A>) {
    const V logits = read<V>(x + i);
    const V numerator = exponential<kWide<A>>(logits - across_fours<Larger, A>(logits));
    write(x + i, numerator / across_fours<Sum, A>(numerator));
  }
}

template <typename A>
PIIP_TARGET void softmax_of_any(A* x, int64_t size, int64_t group) {
  using V = Vec<A, kWide<A>>;
  for (A* first = x; first < x + size; first += group) {
    A largest = first[0];
    for (int64_t i = 1; i < group; ++i) {
      largest = first[i] > largest ? first[i] : largest;
    }
    for (int64_t i = 0; i < group; ++i) {
      first[i] -= largest;
    }
  }
  for (int64_t i = 0; i < size; i += kWide<A>) {
    write(x + i, exponential<kWide<A>>(read<V>(x + i)));
  }
  for (A* first = x; first < x + size; first += group) {
    A sum = 0;
    for (int64_t i = 0; i < group; ++i) {
      sum += first[i];
    }
    for (int64_t i = 0; i < group; ++i) {
      first[i] /= sum;
    }
  }
}

// Replaces logits by weights. PIIP takes four points of one level. Goes through x in whole vectors, so also through some
// elements after it.
template <typename A>
PIIP_TARGET void softmax(A* x, int64_t size, int64_t group) {
  if (group == 4) {
    softmax_of_fours(x, size);
  } else {
    softmax_of_any(x, size, group);
  }
}

// Replaces the gradients of weights by those of logits.
template <typename A>
PIIP_TARGET void softmax_backward(const A* weight, A* grad, int64_t size, int64_t group) {
  using V = Vec<A, kWide<A>>;
  if (group == 4) {
    for (int64_t i = 0; i < size; i += kWide<A>) {
      const V w = read<V>(weight + i), g = read<V>(grad + i);
      write(grad + i, w * (g - across_fours<Sum, A>(w * g)));
    }
    return;
  }
  for (int64_t first = 0; first < size; first += group) {
    A mean = 0;
    for (int64_t i = first; i < first + group; ++i) {
      mean += weight[i] * grad[i];
    }
    for (int64_t i = first; i < first + group; ++i) {
      grad[i] = weight[i] * (grad[i] - mean);
    }
  }
}
