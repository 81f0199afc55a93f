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

// The same for long bodies: a loop that is not unrolled, in which the values of each vector rotate past one register.
template <typename Body>
__device__ __forceinline__ void each_in_turn(Values& x, Body body) {
#pragma unroll 1
  for (int k = 0; k < kWide; ++k) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float value = x.at[i][0];
      body(value, column_of(i, k));
#pragma unroll
      for (int next = 1; next < kWide; ++next) x.at[i][next - 1] = x.at[i][next];
      x.at[i][kWide - 1] = value;
    }
  }
}

__device__ __forceinline__ float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ float from_half(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// 16 bytes from an address that is a multiple of 2 and lies `skew` bytes above a multiple of 16: from the two words of
// 16 bytes that hold them, so that rows of odd length are read as fast as others, nearly.
__device__ __forceinline__ uint4 load_16(const char* address, int skew) {
  const uint4* at = reinterpret_cast<const uint4*>(address - skew);
  const uint4 low = __ldg(at);
  if (skew == 0) return low;
  const uint4 high = __ldg(at + 1);
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
    if (side.type == DType::kFloat)
      fetch_32(first, skew, from, to, x);
    else
      fetch_16(first, skew, from, to, x);
    const bool gathers = allowed_ != nullptr && side.ids != nullptr;
    const bool whole = __ballot_sync(kAll, from > 0 || to < column_of(kVectors - 1, 0)) == 0;
    if (!whole || mixed_ != nullptr || gathers) {
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

  // All loads are under way before the first is used.
  __device__ __forceinline__ void fetch_16(int64_t first, int skew, int from, int to, Values& x) const {
    const char* address = data_ + first * 2;
    uint4 held[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      held[i] = uint4{0, 0, 0, 0};
      if (column_of(i, 0) >= from && column_of(i, 0) <= to) held[i] = load_16(address + column_of(i, 0) * 2, skew);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t words[kWide / 2] = {held[i].x, held[i].y, held[i].z, held[i].w};
#pragma unroll
      for (int k = 0; k < kWide / 2; ++k) {
        const uint32_t low = words[k] & 0xffffu, high = words[k] >> 16;
        x.at[i][2 * k] = side.type == DType::kBf16 ? from_bf16(low) : from_half(low);
        x.at[i][2 * k + 1] = side.type == DType::kBf16 ? from_bf16(high) : from_half(high);
      }
    }
  }

  __device__ __forceinline__ void fetch_32(int64_t first, int skew, int from, int to, Values& x) const {
    const char* address = data_ + first * 4;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const bool inside = column_of(i, 0) >= from && column_of(i, 0) <= to;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint4 held{0, 0, 0, 0};
        if (inside) held = load_16(address + (column_of(i, 0) + 4 * half) * 4, skew);
        const uint32_t words[4] = {held.x, held.y, held.z, held.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) x.at[i][4 * half + k] = __uint_as_float(words[k]);
      }
    }
  }

  const char* const data_;
  const char* const mixed_;
  const uint32_t* const allowed_;
  const float cut_;
};

}  // namespace specdec::device
