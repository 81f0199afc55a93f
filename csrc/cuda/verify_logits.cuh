// Blocks of logits in registers: a warp takes kBlock columns of a row at a time.
#pragma once

#include "verify_team.cuh"

namespace specdec::device {

constexpr int kWide = 8;  // neighbouring columns of a lane
constexpr int kVectors = kBlock / (kLanes * kWide);
static_assert(kVectors * kLanes * kWide == kBlock, "a block is whole vectors of every lane");

constexpr float kInf = __builtin_huge_valf();
constexpr float kLowest = -3.402823466e38f;

// What a lane holds of a block.
struct Values {
  float at[kVectors][kWide];
};

// A lane's value k of vector i is column lane_offset() + column_of(i, k) of the block, however the row is aligned: what
// is summed in which order does not depend on that either.
__device__ __forceinline__ int lane_offset() { return lane() * kWide; }
__device__ __forceinline__ constexpr int column_of(int i, int k) { return i * kLanes * kWide + k; }

// body(value, column_of(i, k)) for everything that a lane holds.
template <typename Body>
__device__ __forceinline__ void each(Values& x, Body body) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
#pragma unroll
    for (int k = 0; k < kWide; ++k) body(x.at[i][k], column_of(i, k));
}

// The same for long bodies: a loop that is not unrolled, in which the values rotate past one register.
template <typename Body>
__device__ __forceinline__ void each_in_turn(Values& x, Body body) {
#pragma unroll 1
  for (int n = 0; n < kVectors * kWide; ++n) {
    float value = x.at[0][0];
    body(value, column_of(n / kWide, n % kWide));
#pragma unroll
    for (int next = 1; next < kVectors * kWide; ++next)
      x.at[(next - 1) / kWide][(next - 1) % kWide] = x.at[next / kWide][next % kWide];
    x.at[kVectors - 1][kWide - 1] = value;
  }
}

__device__ __forceinline__ float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ float from_half(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ __forceinline__ uint4 load_16(const char* address) { return __ldg(reinterpret_cast<const uint4*>(address)); }

// 16 bytes that lie `skew` bytes above a multiple of 16, a multiple of 2: from the two words of 16 bytes that hold
// them.
__device__ __forceinline__ uint4 load_skewed_16(const char* address, int skew) {
  const uint4 low = load_16(address - skew), high = load_16(address - skew + 16);
  uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int j = 0; j < 6; ++j) w[j] = skew & 8 ? w[j + 2] : w[j];
#pragma unroll
  for (int j = 0; j < 5; ++j) w[j] = skew & 4 ? w[j + 1] : w[j];
  const int bits = skew % 4 * 8;
  return {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits), __funnelshift_r(w[2], w[3], bits),
          __funnelshift_r(w[3], w[4], bits)};
}

// One row, and which of its logits count.
class LogitRow {
 public:
  __device__ LogitRow(const Side& side, int64_t row, float cut)
      : side(side),
        data_(side.data + row * side.stride),
        mixed_(side.mixed ? side.mixed + row * side.mixed_stride : nullptr),
        allowed_(side.allowed ? side.allowed + row * side.allowed_stride : nullptr),
        cut_(cut) {}

  __device__ bool allows(int32_t token) const {
    return allowed_ == nullptr || ((__ldg(allowed_ + (token >> 5)) >> (token & 31)) & 1);
  }

  // The logit of a column, whatever the mask says; -inf below the cut.
  __device__ float logit(int64_t column) const {
    float x = one(data_, column);
    if (mixed_) x = mix(x, one(mixed_, column));
    return x < cut_ ? -kInf : x;
  }

  // The block's logits, -inf where a column is not there or does not count.
  __device__ __forceinline__ void read(int64_t block, Values& x) const {
    const int64_t first = block * kBlock + lane_offset();
    const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(data_) & 15);
    // Vectors that lie in the row, and so does what a skewed one reads beside itself; they count from `first`.
    const int beside = skew == 0 ? 0 : side.type == DType::kFloat ? 4 : 8;
    const int from = first < beside ? beside : 0;
    const int to = static_cast<int>(clamped(side.columns - first) - kWide - beside);
    if (skew != 0)
      fetch_skewed(first, skew, from, to, x);
    else if (side.type == DType::kFloat)
      fetch_32(first, to, x);
    else
      fetch_16(first, to, x);
    const bool gathers = allowed_ != nullptr && side.ids != nullptr;
    // Where no vector lies half in the row, those outside are -inf already.
    const bool halves = skew != 0 || side.columns % kWide != 0;
    if ((halves && __ballot_sync(kAll, from > 0 || to < column_of(kVectors - 1, 0))) || mixed_ != nullptr || gathers) {
      each_in_turn(x, [&](float& v, int at) {
        const int start = at / kWide * kWide;
        const bool there = first + at < side.columns;
        if (start < from || start > to) v = there ? one(data_, first + at) : -kInf;
        if (mixed_ != nullptr && there) v = mix(v, one(mixed_, first + at));
        if (gathers && there && !permits(first + at)) v = -kInf;
      });
    }
    if (allowed_ != nullptr && side.ids == nullptr) {
      const uint8_t* bytes = reinterpret_cast<const uint8_t*>(allowed_) + first / kWide;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        unsigned bits = 0;
        if (first + column_of(i, 0) < side.columns) bits = __ldg(bytes + column_of(i, 0) / kWide);
#pragma unroll
        for (int k = 0; k < kWide; ++k)
          if (!((bits >> k) & 1)) x.at[i][k] = -kInf;
      }
    }
    if (cut_ > -kInf) {
      each(x, [&](float& v, int) {
        if (v < cut_) v = -kInf;
      });
    }
  }

  const Side& side;

 private:
  __device__ float one(const char* row, int64_t column) const {
    if (side.type == DType::kFloat) return __ldg(reinterpret_cast<const float*>(row) + column);
    const uint32_t bits = __ldg(reinterpret_cast<const uint16_t*>(row) + column);
    return side.type == DType::kBf16 ? from_bf16(bits) : from_half(bits);
  }

  __device__ float mix(float own, float other) const {
    const float kept = rounded_product(rounded_difference(1.0f, side.mix), own);
    return rounded_difference(kept, -rounded_product(side.mix, other));
  }

  // Whether the mask lets a column of a trimmed vocabulary pass.
  __device__ bool permits(int64_t column) const {
    const int32_t id = __ldg(side.ids + column);
    return id >= 0 && id < side.vocabulary && allows(id);
  }

  // Columns left from a lane's first on, as a small number: what lies beyond the block does not matter.
  static __device__ int64_t clamped(int64_t columns) {
    return columns < -kBlock ? -kBlock : columns < 4 * kBlock ? columns : 4 * kBlock;
  }

  __device__ __forceinline__ void widen_16(const uint4& v, float (&x)[kWide]) const {
    const uint32_t words[kWide / 2] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int k = 0; k < kWide / 2; ++k) {
      const uint32_t low = words[k] & 0xffffu, high = words[k] >> 16;
      x[2 * k] = side.type == DType::kBf16 ? from_bf16(low) : from_half(low);
      x[2 * k + 1] = side.type == DType::kBf16 ? from_bf16(high) : from_half(high);
    }
  }

  static __device__ __forceinline__ void widen_32(const uint4& v, float* x) {
    x[0] = __uint_as_float(v.x);
    x[1] = __uint_as_float(v.y);
    x[2] = __uint_as_float(v.z);
    x[3] = __uint_as_float(v.w);
  }

  // All loads are under way before the first is used.
  __device__ __forceinline__ void fetch_16(int64_t first, int to, Values& x) const {
    const char* address = data_ + first * 2;
    const uint32_t none = side.type == DType::kBf16 ? 0xff80ff80u : 0xfc00fc00u;  // -inf, twice
    uint4 held[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      held[i] = column_of(i, 0) <= to ? load_16(address + column_of(i, 0) * 2) : uint4{none, none, none, none};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) widen_16(held[i], x.at[i]);
  }

  __device__ __forceinline__ void fetch_32(int64_t first, int to, Values& x) const {
    const char* address = data_ + first * 4;
    const uint32_t none = 0xff800000u;  // -inf
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
#pragma unroll
      for (int k = 0; k < kWide; k += 4) {
        const bool inside = column_of(i, 0) <= to;
        widen_32(inside ? load_16(address + column_of(i, k) * 4) : uint4{none, none, none, none}, x.at[i] + k);
      }
  }

  // One vector after another, which takes longer but has registers for what a vector is put together from.
  __device__ __forceinline__ void fetch_skewed(int64_t first, int skew, int from, int to, Values& x) const {
#pragma unroll 1
    for (int i = 0; i < kVectors; ++i) {
      const int at = column_of(i, 0);
#pragma unroll
      for (int next = 1; next < kVectors; ++next)
#pragma unroll
        for (int k = 0; k < kWide; ++k) x.at[next - 1][k] = x.at[next][k];
      if (at < from || at > to) continue;
      if (side.type == DType::kFloat) {
        widen_32(load_skewed_16(data_ + (first + at) * 4, skew), x.at[kVectors - 1]);
        widen_32(load_skewed_16(data_ + (first + at) * 4 + 16, skew), x.at[kVectors - 1] + 4);
      } else {
        widen_16(load_skewed_16(data_ + (first + at) * 2, skew), x.at[kVectors - 1]);
      }
    }
  }

  const char* const data_;
  const char* const mixed_;
  const uint32_t* const allowed_;
  const float cut_;
};

}  // namespace specdec::device
