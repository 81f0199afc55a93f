// How rows of each format are read and multiplied. Lane 4 g + t reads, of row g, the 16 bytes number 4 l + t of a
// chunk, l = 0, 1, ..: four lanes read 64 bytes side by side.
//
// The order of columns within a product of matrices is free as long as both sides agree. So what a lane has read is
// multiplied as it came, eight neighbouring columns (a "granule") after the other, and hidden vectors lie in shared
// memory in that order: granule i of lane t is granule F::granule(i, t) of the chunk.
#pragma once

#include "head_warp.cuh"

namespace specdec::head {

// Two numbers of 16 bits from what quantised weights hold. All are exact.
struct Bf16 {
  static constexpr uint32_t kNan = 0x7FC07FC0u;

  // Signed bytes, each in the low half of 16 bits. There are 7 bits behind the first: 128 + the low 7 bits, less 128
  // or, where the sign is set, 256.
  __device__ __forceinline__ static uint32_t from_bytes(uint32_t v) {
    return fma_2<Bf16>((v & 0x007F007Fu) | 0x43004300u, 0x3F803F80u, (v & 0x00800080u) | 0xC300C300u);
  }
  // q + 8 in the low four bits: (128 + q + 8) - 136.
  __device__ __forceinline__ static uint32_t from_nibbles(uint32_t v) {
    return fma_2<Bf16>((v & 0x000F000Fu) | 0x43004300u, 0x3F803F80u, 0xC308C308u);
  }
  // e4m3, each in the high half of 16 bits: exponent and fraction move to their places, and a product by 2^120 makes up
  // for the other bias, also of subnormal numbers.
  __device__ __forceinline__ static uint32_t from_fp8(uint32_t v) {
    return fma_2<Bf16>((v & 0x80008000u) | ((v & 0x7F007F00u) >> 4), 0x7B807B80u, 0x80008000u);
  }
};

struct Half {
  static constexpr uint32_t kNan = 0x7E007E00u;

  // (1024 + q + 128) - 1152.
  __device__ __forceinline__ static uint32_t from_bytes(uint32_t v) {
    return fma_2<Half>((v ^ 0x00800080u) | 0x64006400u, 0x3C003C00u, 0xE480E480u);
  }
  __device__ __forceinline__ static uint32_t from_nibbles(uint32_t v) {
    return fma_2<Half>((v & 0x000F000Fu) | 0x64006400u, 0x3C003C00u, 0xE408E408u);
  }
  __device__ __forceinline__ static uint32_t from_fp8(uint32_t v) {
    return fma_2<Half>((v & 0x80008000u) | ((v & 0x7F007F00u) >> 1), 0x5C005C00u, 0x80008000u);
  }
};

// Numbers of 16 bits, as they are.
template <class T, Format kOf>
struct Plain {
  using Type = T;
  static constexpr Format kFormat = kOf;
  static constexpr int kLoads = 4;

  __device__ static constexpr int granule(int i, int t) { return i * 4 + t; }
  // Columns 4 half .. 4 half + 3 of granule i.
  __device__ __forceinline__ static void pair(const uint4* row, int i, int half, uint32_t& b0, uint32_t& b1) {
    b0 = word_of(row[i], 2 * half);
    b1 = word_of(row[i], 2 * half + 1);
  }
};

// Numbers of 8 bits: 16 bytes are two granules.
struct Bytes {
  static constexpr int kLoads = 4;

  __device__ static constexpr int granule(int i, int t) { return i / 2 * 8 + t * 2 + i % 2; }
  __device__ __forceinline__ static uint32_t word(const uint4* row, int i, int half) {
    return word_of(row[i / 2], i % 2 * 2 + half);
  }
};

template <class T>
struct Int8 : Bytes {
  using Type = T;
  static constexpr Format kFormat = Format::kInt8;

  __device__ __forceinline__ static void pair(const uint4* row, int i, int half, uint32_t& b0, uint32_t& b1) {
    const uint32_t w = word(row, i, half);
    b0 = T::from_bytes(__byte_perm(w, 0, 0x4140));
    b1 = T::from_bytes(__byte_perm(w, 0, 0x4342));
  }
};

template <class T>
struct Fp8 : Bytes {
  using Type = T;
  static constexpr Format kFormat = Format::kFp8;

  __device__ __forceinline__ static void pair(const uint4* row, int i, int half, uint32_t& b0, uint32_t& b1) {
    const uint32_t w = word(row, i, half);
    b0 = T::from_fp8(__byte_perm(w, 0, 0x1404));
    b1 = T::from_fp8(__byte_perm(w, 0, 0x3424));
    // A NaN, all ones but for the sign, has become a number: it spoils the chunk's first product instead.
    if (i == 0 && half == 0 && has_nan(row)) b0 = T::kNan;
  }

 private:
  __device__ __forceinline__ static bool has_nan(const uint4* row) {
    uint32_t found = 0;
#pragma unroll
    for (int n = 0; n < 4 * kLoads; ++n) found |= (word_of(row[n / 4], n % 4) & 0x7F7F7F7Fu) + 0x01010101u;
    return (found & 0x80808080u) != 0;
  }
};

// Numbers of 4 bits: byte j of the 64 of a chunk holds columns j and j + 64.
template <class T>
struct Int4 {
  using Type = T;
  static constexpr Format kFormat = Format::kInt4;
  static constexpr int kLoads = 1;

  __device__ static constexpr int granule(int i, int t) { return i / 2 * 8 + t * 2 + i % 2; }
  __device__ __forceinline__ static void pair(const uint4* row, int i, int half, uint32_t& b0, uint32_t& b1) {
    const uint32_t w = word_of(row[0], i % 2 * 2 + half) >> (i / 2 * 4);
    b0 = T::from_nibbles(__byte_perm(w, 0, 0x4140));
    b1 = T::from_nibbles(__byte_perm(w, 0, 0x4342));
  }
};

// fp32 multiplies without tensor cores, whose numbers have fewer bits.
struct Float {
  static constexpr Format kFormat = Format::kFloat;
  static constexpr int kLoads = 4;
};

// What a loader holds of a chunk.
template <class F>
struct Words {
  static constexpr int kTiles = shape_of(F::kFormat).tiles;
  uint4 at[kTiles][F::kLoads];
  float scale[F::kFormat == Format::kInt4 ? kTiles : 1];  // of the group of columns that the chunk is
};

// Sums of products of a tile with a slice of the columns, in the order of multiply_add().
template <class F>
struct Products {
  static constexpr int kTiles = shape_of(F::kFormat).tiles;
  float at[kTiles][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) at[n][j] = 0.0f;
  }

  // `hidden`: this lane's part of the chunk of vector g, `other`: of vector g + 8, or null.
  __device__ __forceinline__ void add(const Words<F>& words, const char* hidden, const char* other) {
    if constexpr (F::kFormat == Format::kInt4) {
      Products chunk;
      chunk.clear();
      chunk.multiply(words, hidden, other);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        // Lane 4 g + t has the scale of row g, and sums of rows 2t and 2t + 1.
        const float even = __shfl_sync(kAll, words.scale[n], lane() % 4 * 8);
        const float odd = __shfl_sync(kAll, words.scale[n], lane() % 4 * 8 + 4);
#pragma unroll
        for (int j = 0; j < 4; ++j) at[n][j] = fmaf(chunk.at[n][j], j % 2 == 0 ? even : odd, at[n][j]);
      }
    } else {
      multiply(words, hidden, other);
    }
  }

 private:
  __device__ __forceinline__ void multiply(const Words<F>& words, const char* hidden, const char* other) {
#pragma unroll
    for (int i = 0; i < shape_of(F::kFormat).chunk / 32; ++i) {
      const uint4 x = *reinterpret_cast<const uint4*>(hidden + i * 64);
      uint4 y = {0, 0, 0, 0};
      if (other != nullptr) y = *reinterpret_cast<const uint4*>(other + i * 64);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t a[4] = {word_of(x, 2 * half), word_of(y, 2 * half), word_of(x, 2 * half + 1),
                               word_of(y, 2 * half + 1)};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          uint32_t b0, b1;
          F::pair(words.at[n], i, half, b0, b1);
          multiply_add<typename F::Type>(at[n], a, b0, b1);
        }
      }
    }
  }
};

// fp32: a lane multiplies what it has read with all hidden vectors, and four lanes share a row.
template <>
struct Products<Float> {
  static constexpr int kTiles = shape_of(Format::kFloat).tiles, kVectors = 8;
  float at[kTiles][kVectors];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int v = 0; v < kVectors; ++v) at[n][v] = 0.0f;
  }

  // `hidden`: this lane's part of the chunk of the first vector.
  __device__ __forceinline__ void add(const Words<Float>& words, const char* hidden, int64_t pitch, int vectors) {
#pragma unroll
    for (int l = 0; l < Float::kLoads; ++l) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v >= vectors) break;
        const uint4 x = *reinterpret_cast<const uint4*>(hidden + v * pitch + l * 64);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            at[n][v] = fmaf(__uint_as_float(word_of(words.at[n][l], j)), __uint_as_float(word_of(x, j)), at[n][v]);
      }
    }
  }

  // Vectors 2t and 2t + 1 of row g, the same bits in whichever order lanes are added.
  __device__ __forceinline__ void share(int n, float& even, float& odd) {
    even = odd = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float sum = at[n][v] + __shfl_xor_sync(kAll, at[n][v], 1);
      sum += __shfl_xor_sync(kAll, sum, 2);
      if (v / 2 == lane() % 4) (v % 2 == 0 ? even : odd) = sum;
    }
  }
};

}  // namespace specdec::head
