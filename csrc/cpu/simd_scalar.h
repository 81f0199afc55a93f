// One lane: what every machine runs, and the plainest reading of what the other tiers do.
#pragma once

namespace specdec::SPECDEC_TIER {

constexpr int kWidth = 1;
using Vec = float;
using Ints = uint32_t;
using Mask = bool;

SPECDEC_INLINE Vec as_floats(Ints a) {
  Vec r;
  __builtin_memcpy(&r, &a, sizeof r);
  return r;
}
SPECDEC_INLINE Ints as_ints(Vec a) {
  Ints r;
  __builtin_memcpy(&r, &a, sizeof r);
  return r;
}

SPECDEC_INLINE Vec set1(float a) { return a; }
SPECDEC_INLINE Vec load(const float* p) { return *p; }
SPECDEC_INLINE Vec load(const Bf16* p) { return as_floats(static_cast<uint32_t>(p->bits) << 16); }
SPECDEC_INLINE Vec load(const Half* p) {
  const uint32_t sign = (p->bits & 0x8000u) << 16, magnitude = p->bits & 0x7FFFu;
  // Subnormals: magnitude * 2^-24 is exact. The rest: shift the exponent's bias from 15 to 127 (inf and NaN: to 255).
  if (magnitude < 0x0400u) return as_floats(sign | as_ints(static_cast<float>(magnitude) * 0x1p-24f));
  const uint32_t bias = magnitude >= 0x7C00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
  return as_floats(sign | ((magnitude << 13) + bias));
}
template <typename T>
SPECDEC_INLINE Vec load(const T* p, int n, float fill) {
  return n > 0 ? load(p) : fill;
}
SPECDEC_INLINE void store(float* p, Vec a) { *p = a; }
SPECDEC_INLINE void store(float* p, Vec a, int n) {
  if (n > 0) *p = a;
}

SPECDEC_INLINE void store(Half* p, Vec a, int n) {
  if (n <= 0) return;
  const uint32_t sign = as_ints(a) >> 16 & 0x8000u, magnitude = as_ints(a) & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 2^16 and above, inf, NaN
    half = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 1/2 rounds at 2^-24
    half = as_ints(as_floats(magnitude) + 0.5f) - as_ints(0.5f);
  } else {
    half = (magnitude + 0xFFFu + (magnitude >> 13 & 1) - ((127u - 15u) << 23)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}

SPECDEC_INLINE Vec add(Vec a, Vec b) { return a + b; }
SPECDEC_INLINE Vec sub(Vec a, Vec b) { return a - b; }
SPECDEC_INLINE Vec mul(Vec a, Vec b) { return a * b; }
SPECDEC_INLINE Vec div(Vec a, Vec b) { return a / b; }
SPECDEC_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
SPECDEC_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
SPECDEC_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
// Adding 1.5 * 2^23 leaves no room for a fraction (|a| < 2^22).
SPECDEC_INLINE Vec round(Vec a) { return (a + 0x1.8p23f) - 0x1.8p23f; }
SPECDEC_INLINE Vec floor(Vec a) { return __builtin_floorf(a); }

SPECDEC_INLINE Mask gt(Vec a, Vec b) { return a > b; }
SPECDEC_INLINE Mask ge(Vec a, Vec b) { return a >= b; }
SPECDEC_INLINE Mask eq(Vec a, Vec b) { return a == b; }
SPECDEC_INLINE Mask not_lt(Vec a, Vec b) { return !(a < b); }
SPECDEC_INLINE Mask first(int n) { return n > 0; }
SPECDEC_INLINE Mask both(Mask a, Mask b) { return a && b; }
SPECDEC_INLINE Mask either(Mask a, Mask b) { return a || b; }
SPECDEC_INLINE Vec select(Mask m, Vec a, Vec b) { return m ? a : b; }
SPECDEC_INLINE uint32_t bits(Mask m) { return m; }
SPECDEC_INLINE bool any(Mask m) { return m; }
SPECDEC_INLINE Mask mask_of(uint32_t bits) { return bits & 1; }

SPECDEC_INLINE int compress(float* p, Mask m, Vec a) {
  *p = a;
  return m;
}

SPECDEC_INLINE float reduce_add(Vec a) { return a; }
SPECDEC_INLINE float reduce_max(Vec a) { return a; }
SPECDEC_INLINE Vec sums_of(const Vec* a) { return *a; }
SPECDEC_INLINE void transpose(Vec*) {}

SPECDEC_INLINE Ints iset1(uint32_t a) { return a; }
SPECDEC_INLINE Ints iload(const int32_t* p) { return static_cast<uint32_t>(*p); }
SPECDEC_INLINE Ints iota() { return 0; }
SPECDEC_INLINE Ints bytes(const uint8_t* p, int n) { return n > 0 ? *p : 0; }
SPECDEC_INLINE void halves(uint16_t* p, Ints a, int n) {
  if (n > 0) *p = static_cast<uint16_t>(a);
}
SPECDEC_INLINE Ints iadd(Ints a, Ints b) { return a + b; }
SPECDEC_INLINE Ints isub(Ints a, Ints b) { return a - b; }
SPECDEC_INLINE Ints iand(Ints a, Ints b) { return a & b; }
SPECDEC_INLINE Ints ixor(Ints a, Ints b) { return a ^ b; }
SPECDEC_INLINE Ints shift_left(Ints a, int n) { return a << n; }
SPECDEC_INLINE Ints shift_right(Ints a, int n) { return a >> n; }
SPECDEC_INLINE Mask ieq(Ints a, Ints b) { return a == b; }
SPECDEC_INLINE Ints iselect(Mask m, Ints a, Ints b) { return m ? a : b; }
SPECDEC_INLINE Vec to_floats(Ints a) { return static_cast<float>(static_cast<int32_t>(a)); }  // signed
SPECDEC_INLINE Vec to_floats_unsigned(Ints a) { return static_cast<float>(a); }
SPECDEC_INLINE Ints to_ints(Vec a) { return static_cast<uint32_t>(static_cast<int32_t>(a)); }
SPECDEC_INLINE void multiply_wide(Ints a, uint32_t b, Ints* high, Ints* low) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  *high = static_cast<uint32_t>(product >> 32);
  *low = static_cast<uint32_t>(product);
}

// a * 2^n for integral n in [-252, 254]: in two steps, because 2^n alone may not be representable.
SPECDEC_INLINE Vec scale_by_power(Vec a, Vec n) {
  // A NaN stays one whatever it is multiplied with, but must not be converted.
  const int32_t whole = n == n ? static_cast<int32_t>(n) : 0;
  const int32_t half = whole >> 1;
  return a * as_floats(static_cast<uint32_t>(half + 127) << 23) *
         as_floats(static_cast<uint32_t>(whole - half + 127) << 23);
}

}  // namespace specdec::SPECDEC_TIER
