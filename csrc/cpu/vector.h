// Vectors of float or double by the GCC/Clang extension, and the conversion of 16-bit types to and from them.
// Included by kernel_impl.h inside its own namespace, see there.

template <typename A, int64_t kCount>
struct VecOf {
  typedef A type __attribute__((vector_size(kCount * sizeof(A))));
};
template <typename A, int64_t kCount = kLanes>
using Vec = typename VecOf<A, kCount>::type;

// The lanes of the longest vector that is one register; never less than kLanes.
template <typename A>
constexpr int64_t kWide = PIIP_WIDE_BYTES / int64_t{sizeof(A)} > kLanes ? PIIP_WIDE_BYTES / sizeof(A) : kLanes;

// Whether that is one register. The compiler shuffles what takes more than one lane by lane.
template <typename A>
constexpr bool kOneRegister = kWide<A> * sizeof(A) == PIIP_WIDE_BYTES;

// A vector of any type from memory, aligned or not, and back.
template <typename V>
PIIP_INLINE V read(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
PIIP_INLINE void write(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <typename To, typename From>
PIIP_INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// load<n>(p) reads n elements at p, aligned or not, and widens them; store(p, v) rounds to nearest even.
template <int64_t n = kLanes>
PIIP_INLINE Vec<float, n> load(const float* p) {
  return read<Vec<float, n>>(p);
}
template <int64_t n = kLanes>
PIIP_INLINE Vec<double, n> load(const double* p) {
  return read<Vec<double, n>>(p);
}
PIIP_INLINE void store(float* p, Vec<float> v) {
  write(p, v);
}
PIIP_INLINE void store(double* p, Vec<double> v) {
  write(p, v);
}

template <int64_t n>
PIIP_INLINE Vec<uint32_t, n> widen(const uint16_t* p) {
  return __builtin_convertvector((read<Vec<uint16_t, n>>(p)), Vec<uint32_t, n>);
}
PIIP_INLINE void narrow(uint16_t* p, Vec<uint32_t> bits) {
  write(p, __builtin_convertvector(bits, Vec<uint16_t>));
}

template <int64_t n = kLanes>
PIIP_INLINE Vec<float, n> load(const BFloat16Bits* p) {
  return same_bits<Vec<float, n>>(widen<n>(&p->bits) << 16);
}
PIIP_INLINE void store(BFloat16Bits* p, Vec<float> v) {
  using Bits = Vec<uint32_t>;
  const Bits bits = same_bits<Bits>(v);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  narrow(&p->bits, (bits & 0x7fffffffu) > 0x7f800000u ? Bits{} + 0x7fc0u : rounded);
}

// IEEE half in integer arithmetic: shift exponent and mantissa into place, rebias, and treat the two ends apart.
template <int64_t n = kLanes>
PIIP_INLINE Vec<float, n> load(const HalfBits* p) {
  using Bits = Vec<uint32_t, n>;
  using Floats = Vec<float, n>;
  const Bits half = widen<n>(&p->bits);
  const Bits moved = (half & 0x7fffu) << 13;
  const Bits exponent = moved & 0x0f800000u;
  const Bits normal = moved + (112u << 23);
  const Bits special = moved + (224u << 23);  // infinity and NaN
  const Floats magic = same_bits<Floats>(Bits{} + (113u << 23));
  const Bits subnormal = same_bits<Bits>(same_bits<Floats>(moved + (113u << 23)) - magic);
  Bits result = exponent == 0x0f800000u ? special : normal;
  result = exponent == 0u ? subnormal : result;
  return same_bits<Floats>(result | ((half & 0x8000u) << 16));
}
PIIP_INLINE void store(HalfBits* p, Vec<float> v) {
  using Bits = Vec<uint32_t>;
  using Floats = Vec<float>;
  const Bits bits = same_bits<Bits>(v);
  const Bits sign = (bits >> 16) & 0x8000u;
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 puts the bits of a half subnormal at the low end of the float, correctly rounded by the addition.
  const Floats magic = same_bits<Floats>(Bits{} + (126u << 23));
  const Bits subnormal = same_bits<Bits>(same_bits<Floats>(magnitude) + magic) - (126u << 23);
  Bits result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= (143u << 23) ? Bits{} + 0x7c00u : result;  // 65536 and more, infinity
  result = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : result;
  narrow(&p->bits, result | sign);
}

// The lanes kIndex of a followed by b.
template <int... kIndex, typename V>
PIIP_INLINE auto permute(V a, V b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, kIndex...);
#else
  using A = std::remove_reference_t<decltype(a[0])>;
  constexpr int kCount = sizeof(V) / sizeof(A);
  Vec<A, sizeof...(kIndex)> result;
  int lane = 0;
  ((result[lane++] = kIndex < kCount ? a[kIndex % kCount] : b[kIndex % kCount]), ...);
  return result;
#endif
}

template <int64_t kCount>
using LanesUpTo = std::make_integer_sequence<int, kCount>;

// Takes pairs apart, and joins them: (a0 a1 a2 .. b0 b1 ..) to (a0 a2 .. b0 b2 ..) and (a1 a3 .. b1 b3 ..), and back.
template <typename V, int... kLane>
PIIP_INLINE void split_pairs(V a, V b, V& first, V& second, std::integer_sequence<int, kLane...>) {
  first = permute<(2 * kLane)...>(a, b);
  second = permute<(2 * kLane + 1)...>(a, b);
}
template <typename V, int... kLane>
PIIP_INLINE void join_pairs(V first, V second, V& a, V& b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  a = permute<(kLane / 2 + kLane % 2 * kCount)...>(first, second);
  b = permute<(kCount / 2 + kLane / 2 + kLane % 2 * kCount)...>(first, second);
}

// a b a b a b .. of two floats in memory: a single load.
template <typename V>
PIIP_INLINE V repeat_pair(const float* p) {
  return same_bits<V>(Vec<int64_t, sizeof(V) / sizeof(int64_t)>{} + read<int64_t>(p));
}
template <int kWhich, typename V, int... kLane>
PIIP_INLINE V one_of_pairs(V v, std::integer_sequence<int, kLane...>) {
  return permute<(kLane / 2 * 2 + kWhich)...>(v, v);
}

// Four vectors, each with one of four numbers in all lanes.
template <typename V, typename A>
PIIP_INLINE void repeat_each(const A* p, V (&v)[4]) {
  constexpr int64_t kCount = sizeof(V) / sizeof(A), kStep = kOneRegister<A> ? kCount : 4;
  if constexpr (kOneRegister<A> && sizeof(A) == sizeof(float)) {
    const V first = repeat_pair<V>(p), second = repeat_pair<V>(p + 2);
    v[0] = one_of_pairs<0>(first, LanesUpTo<kCount>{});
    v[1] = one_of_pairs<1>(first, LanesUpTo<kCount>{});
    v[2] = one_of_pairs<0>(second, LanesUpTo<kCount>{});
    v[3] = one_of_pairs<1>(second, LanesUpTo<kCount>{});
  } else {
    for (int k = 0; k < 4; ++k) {
      for (int64_t lane = 0; lane < kCount; lane += kStep) {  // by registers: a longer vector is filled lane by lane
        write(reinterpret_cast<A*>(v + k) + lane, Vec<A, kStep>{} + p[k]);
      }
    }
  }
}

// From a b a b a b .. a in the lower half and b in the upper; the lower half twice; the lanes of both halves in turn.
template <typename V, int... kLane>
PIIP_INLINE V part_pairs(V v, std::integer_sequence<int, kLane...>) {
  return permute<(kLane >= int{sizeof...(kLane)} / 2)...>(v, v);
}
template <typename V, int... kLane>
PIIP_INLINE V repeat_half(V v, std::integer_sequence<int, kLane...>) {
  return permute<(kLane % (int{sizeof...(kLane)} / 2))...>(v, v);
}
template <typename V, int... kLane>
PIIP_INLINE V join_halves(V v, std::integer_sequence<int, kLane...>) {
  return permute<(kLane / 2 + kLane % 2 * (int{sizeof...(kLane)} / 2))...>(v, v);
}

// Swaps neighbouring blocks of kDistance lanes.
template <int kDistance, typename V, int... kLane>
PIIP_INLINE V swap_lanes(V v, std::integer_sequence<int, kLane...>) {
  return permute<(kLane ^ kDistance)...>(v, v);
}

// Adds the upper half of the lanes to the lower, if a To is half as long; if it is as long, nothing happens.
template <typename To, typename From>
PIIP_INLINE To fold_to(const From& v) {
  if constexpr (sizeof(To) == sizeof(From)) {
    return v;
  } else {
    return read<To>(&v) + read<To>(reinterpret_cast<const char*>(&v) + sizeof(To));
  }
}

// Of every four lanes in a row the sum: a's, b's, c's, d's, in these four lanes. By shuffles that even SSE has.
template <typename V, int... kLane>
PIIP_INLINE V sum_fours(V a, V b, V c, V d, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const V ab = permute<(kLane / 4 * 4 + kLane % 4 / 2 + kLane % 2 * kCount)...>(a, b) +
      permute<(kLane / 4 * 4 + kLane % 4 / 2 + kLane % 2 * kCount + 2)...>(a, b);
  const V cd = permute<(kLane / 4 * 4 + kLane % 4 / 2 + kLane % 2 * kCount)...>(c, d) +
      permute<(kLane / 4 * 4 + kLane % 4 / 2 + kLane % 2 * kCount + 2)...>(c, d);
  return permute<(kLane / 4 * 4 + kLane % 2 + kLane % 4 / 2 * kCount)...>(ab, cd) +
      permute<(kLane / 4 * 4 + kLane % 2 + kLane % 4 / 2 * kCount + 2)...>(ab, cd);
}

// Lanes without the bit kDistance in their number come from a, the others from b. To each is added its neighbour, the
// lane whose number differs in that bit.
template <int kDistance, typename V, int... kLane>
PIIP_INLINE V add_neighbours(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  return permute<(kLane & kDistance ? kCount + kLane : kLane)...>(a, b) +
      permute<((kLane & kDistance ? kCount + kLane : kLane) ^ kDistance)...>(a, b);
}

// Sums groups of kGroup lanes, transposing while it adds: lane i of a group is the group's sum in v[i % kVectors].
template <int kGroup, typename V, int kVectors>
PIIP_INLINE V sum_lanes(const V (&v)[kVectors]) {
  constexpr LanesUpTo<sizeof(V) / sizeof(v[0][0])> lanes;
  V sums[kGroup / 4];
  for (int k = 0; k < kGroup; k += 4) {
    const V* four = v + k % kVectors;
    sums[k / 4] = sum_fours(four[0], four[1], four[2 % kVectors], four[3 % kVectors], lanes);
  }
  if constexpr (kGroup == 16) {
    sums[0] = add_neighbours<8>(sums[0], sums[2], lanes);
    sums[1] = add_neighbours<8>(sums[1], sums[3], lanes);
  }
  if constexpr (kGroup >= 8) {
    sums[0] = add_neighbours<4>(sums[0], sums[1], lanes);
  }
  return sums[0];
}

// e^x for x <= 0, within 2 units in the last place; 0 below -87, where float has no more normal numbers. NaN for NaN.
template <int64_t n>
PIIP_INLINE Vec<float, n> exponential(Vec<float, n> x) {
  using Bits = Vec<uint32_t, n>;
  // 1.5 * 2^23: what is added to it is rounded to an integer, which stands in the low bits.
  const Vec<float, n> rounding = Vec<float, n>{} + 12582912.f;
  const Vec<float, n> shifted = x * 1.44269504f + rounding;
  const Vec<float, n> power = shifted - rounding;  // x = power * log(2) + rest, log(2) in two parts
  const Vec<float, n> rest = x - power * 0.693359375f + power * 2.12194440e-4f;
  Vec<float, n> sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.f;
  const Vec<float, n> scale = same_bits<Vec<float, n>>((same_bits<Bits>(shifted) + 127u) << 23);
  return x < -87.f ? Vec<float, n>{} : sum * scale;
}
template <int64_t n>
PIIP_INLINE Vec<double, n> exponential(Vec<double, n> x) {
  for (int64_t lane = 0; lane < n; ++lane) {
    x[lane] = __builtin_exp(x[lane]);
  }
  return x;
}
