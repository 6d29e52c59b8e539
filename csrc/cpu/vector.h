// Eight lanes of float or double as a GCC/Clang vector, and the conversion of 16-bit types to and from them.
// Included by kernel_impl.h inside its own namespace, see there.

typedef float FloatVec __attribute__((vector_size(kLanes * sizeof(float))));
typedef double DoubleVec __attribute__((vector_size(kLanes * sizeof(double))));
typedef uint32_t UIntVec __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint16_t ShortVec __attribute__((vector_size(kLanes * sizeof(uint16_t))));

template <typename A>
struct VecOf;
template <>
struct VecOf<float> {
  using type = FloatVec;
};
template <>
struct VecOf<double> {
  using type = DoubleVec;
};
template <typename A>
using Vec = typename VecOf<A>::type;

// load(p) reads eight elements at p, aligned or not, and widens them; store(p, v) rounds to nearest even.
PIIP_INLINE FloatVec load(const float* p) {
  FloatVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
PIIP_INLINE DoubleVec load(const double* p) {
  DoubleVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
PIIP_INLINE void store(float* p, FloatVec v) {
  __builtin_memcpy(p, &v, sizeof v);
}
PIIP_INLINE void store(double* p, DoubleVec v) {
  __builtin_memcpy(p, &v, sizeof v);
}

PIIP_INLINE UIntVec widen(const uint16_t* p) {
  ShortVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, UIntVec);
}
PIIP_INLINE void narrow(uint16_t* p, UIntVec bits) {
  const ShortVec v = __builtin_convertvector(bits, ShortVec);
  __builtin_memcpy(p, &v, sizeof v);
}
PIIP_INLINE UIntVec choose(IntVec condition, UIntVec yes, UIntVec no) {
  UIntVec mask;
  __builtin_memcpy(&mask, &condition, sizeof mask);
  return (mask & yes) | (~mask & no);
}
PIIP_INLINE FloatVec as_float(UIntVec v) {
  FloatVec f;
  __builtin_memcpy(&f, &v, sizeof f);
  return f;
}
PIIP_INLINE UIntVec as_bits(FloatVec v) {
  UIntVec u;
  __builtin_memcpy(&u, &v, sizeof u);
  return u;
}

PIIP_INLINE FloatVec load(const BFloat16Bits* p) {
  return as_float(widen(&p->bits) << 16);
}
PIIP_INLINE void store(BFloat16Bits* p, FloatVec v) {
  const UIntVec bits = as_bits(v);
  const UIntVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UIntVec result = choose((bits & 0x7fffffffu) > 0x7f800000u, UIntVec{} + 0x7fc0u, rounded);
  narrow(&p->bits, result);
}

// IEEE half in integer arithmetic: shift exponent and mantissa into place, rebias, and treat the two ends apart.
PIIP_INLINE FloatVec load(const HalfBits* p) {
  const UIntVec half = widen(&p->bits);
  const UIntVec moved = (half & 0x7fffu) << 13;
  const UIntVec exponent = moved & 0x0f800000u;
  const UIntVec normal = moved + (112u << 23);
  const UIntVec special = moved + (224u << 23);  // infinity and NaN
  const FloatVec magic = as_float(UIntVec{} + (113u << 23));
  const UIntVec subnormal = as_bits(as_float(moved + (113u << 23)) - magic);
  UIntVec result = choose(exponent == 0x0f800000u, special, normal);
  result = choose(exponent == 0u, subnormal, result);
  return as_float(result | ((half & 0x8000u) << 16));
}
PIIP_INLINE void store(HalfBits* p, FloatVec v) {
  const UIntVec bits = as_bits(v);
  const UIntVec sign = (bits >> 16) & 0x8000u;
  const UIntVec magnitude = bits & 0x7fffffffu;
  const UIntVec normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 puts the bits of a half subnormal at the low end of the float, correctly rounded by the addition.
  const FloatVec magic = as_float(UIntVec{} + (126u << 23));
  const UIntVec subnormal = as_bits(as_float(magnitude) + magic) - (126u << 23);
  UIntVec result = choose(magnitude < (113u << 23), subnormal, normal);
  result = choose(magnitude >= (143u << 23), UIntVec{} + 0x7c00u, result);  // 65536 and more, infinity
  result = choose(magnitude > 0x7f800000u, UIntVec{} + 0x7e00u, result);
  narrow(&p->bits, result | sign);
}

#if __has_builtin(__builtin_shufflevector)
template <typename V>
PIIP_INLINE auto halve(const V& v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
#endif

// The sums of the lanes of four vectors.
template <typename A>
PIIP_INLINE void sum_lanes(const Vec<A> (&v)[4], A* sums) {
#if __has_builtin(__builtin_shufflevector)
  // Transposes while adding: 8 lanes to 4 of each vector, then to 2 of two vectors, then to 1 of all four.
  const auto a = halve(v[0]), b = halve(v[1]), c = halve(v[2]), d = halve(v[3]);
  const auto ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const auto cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const auto all = __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  __builtin_memcpy(sums, &all, sizeof all);
#else
  for (int k = 0; k < 4; ++k) {
    sums[k] = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums[k] += v[k][lane];
    }
  }
#endif
}
