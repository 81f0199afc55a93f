// Hidden vectors into shared memory, once, and rows of the weight through registers.
#pragma once

#include "head_formats.cuh"
#include "head_runs.cuh"

namespace specdec::head {

// Two neighbouring numbers of a hidden vector as a register holds them, 0 behind the end of the vector. fp32 is cut
// into `high`, not rounded, which would make infinity of large numbers, and what is left.
struct Pair {
  uint32_t high, low;
};

__device__ __forceinline__ Pair load_pair(const Launch& launch, const char* vector, int column) {
  Pair pair = {0, 0};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (column + j >= launch.dim) continue;
    const char* from = vector + (column + j) * launch.hidden_step;
    if (launch.split()) {
      const float x = __ldg(reinterpret_cast<const float*>(from));
      const uint32_t high = __float_as_uint(x) >> 16;
      pair.high |= high << (16 * j);
      pair.low |= to_bf16(x - from_bf16(high)) << (16 * j);
    } else {
      pair.high |= static_cast<uint32_t>(__ldg(reinterpret_cast<const uint16_t*>(from))) << (16 * j);
    }
  }
  return pair;
}

// The whole thread block copies the hidden vectors of a run, in the order in which warps multiply them.
template <class F>
__device__ __forceinline__ void pack_hidden(const Launch& launch, const Run& run, char* shared) {
  constexpr int kGranules = shape_of(F::kFormat).chunk / 8;
  const int granules = launch.chunks() * kGranules;
  const bool whole = launch.hidden_type != DType::kFloat && launch.hidden_step == 2 && launch.dim % 8 == 0 &&
                     ((reinterpret_cast<uintptr_t>(launch.hidden) | launch.hidden_stride) & 15) == 0;
#pragma unroll 2
  for (int item = static_cast<int>(threadIdx.x); item < run.size * granules; item += static_cast<int>(blockDim.x)) {
    const int v = item / granules, place = item % granules;
    const char* vector = launch.hidden + (run.first + v) * launch.hidden_stride;
    char* to = shared + v * launch.shared.hidden_pitch;
    if constexpr (F::kFormat == Format::kFloat) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int column = place * 8 + j;
        const char* from = vector + column * launch.hidden_step;
        reinterpret_cast<float*>(to)[column] = column < launch.dim ? __ldg(reinterpret_cast<const float*>(from)) : 0.0f;
      }
    } else {
      const int column = (place / kGranules * kGranules + F::granule(place % kGranules / 4, place % 4)) * 8;
      uint4 high = {0, 0, 0, 0};
      if (whole) {
        if (column < launch.dim) high = __ldg(reinterpret_cast<const uint4*>(vector + column * 2));
      } else {
        const Pair x = load_pair(launch, vector, column), y = load_pair(launch, vector, column + 2),
                   z = load_pair(launch, vector, column + 4), w = load_pair(launch, vector, column + 6);
        high = {x.high, y.high, z.high, w.high};
        if (launch.split())
          *reinterpret_cast<uint4*>(to + launch.columns * launch.shared.hidden_pitch + place * 16) = {x.low, y.low,
                                                                                                      z.low, w.low};
      }
      *reinterpret_cast<uint4*>(to + place * 16) = high;
    }
  }
}

// 16 bytes of a row of which `left` are there, in pieces of 4, 2 or 1 bytes.
__device__ __forceinline__ uint4 load_pieces(const char* from, int64_t left, int width) {
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t word = 0;
    if (width >= 4) {
      if (4 * j < left) word = __ldg(reinterpret_cast<const uint32_t*>(from) + j);
    } else if (width == 2) {
      for (int i = 0; i < 2; ++i)
        if (4 * j + 2 * i < left)
          word |= static_cast<uint32_t>(__ldg(reinterpret_cast<const uint16_t*>(from) + 2 * j + i)) << (16 * i);
    } else {
      for (int i = 0; i < 4; ++i)
        if (4 * j + i < left)
          word |= static_cast<uint32_t>(__ldg(reinterpret_cast<const uint8_t*>(from) + 4 * j + i)) << (8 * i);
    }
    words[j] = word;
  }
  return {words[0], words[1], words[2], words[3]};
}

template <class F>
class Loader {
  static constexpr Shape kShape = shape_of(F::kFormat);
  static constexpr int kTiles = kShape.tiles;

 public:
  __device__ __forceinline__ Loader(const Launch& launch, const Run& run, char* shared)
      : launch_(launch), run_(run), shared_(shared) {
    const int slice = warp() % kSlices, chunks = launch.chunks();
    first_chunk_ = chunks * slice / kSlices;
    end_chunk_ = chunks * (slice + 1) / kSlices;
  }

  // Asks for the first chunk, so that it is under way while hidden vectors are copied.
  __device__ __forceinline__ void start() {
    look_up(run_.begin);
    if (first_chunk_ < end_chunk_ && run_.begin < run_.end) fetch(run_.begin, first_chunk_);
  }

  // The sums of the tile whose first row is `start`, where all warps find them after the next barrier. Asks for the
  // first chunk of the next tile, if there is one.
  __device__ __forceinline__ void multiply(int tile, int start) {
    const int next = start + launch_.tile_rows();
    Products<F> sums;
    sums.clear();
    // The rows of the next tile, which are needed with its first chunk.
    if (run_.rows != nullptr && index_of(next) < run_.end) prefetch(run_.rows + index_of(next));
    for (int chunk = first_chunk_; chunk < end_chunk_; ++chunk) {
      const Words<F> words = ahead_;
      const bool last = chunk + 1 == end_chunk_;
      if (last) look_up(next);
      if (!last || next < run_.end) fetch(last ? next : start, last ? first_chunk_ : chunk + 1);
      add(words, chunk, sums);
    }
    put(sums, tile);
  }

 private:
  // This lane's first row of the tile that starts at `start`; the others follow eight by eight.
  __device__ __forceinline__ int index_of(int start) const {
    return start + warp() / kSlices * 8 * kTiles + lane() / 4;
  }
  __device__ __forceinline__ int row_of(int index) const {
    return index < run_.end ? row_at(launch_, run_, index) : -1;
  }

  __device__ __forceinline__ void look_up(int start) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) rows_[n] = row_of(index_of(start) + 8 * n);
  }

  // Rows that are not there are zeros.
  __device__ __forceinline__ void fetch(int start, int chunk) {
    const int64_t offset = static_cast<int64_t>(chunk) * kShape.bytes + lane() % 4 * 16;
    if (launch_.width == 16) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const char* from = launch_.weight + rows_[n] * launch_.weight_stride + offset;
#pragma unroll
        for (int l = 0; l < F::kLoads; ++l)
          ahead_.at[n][l] = load_once(from + l * 64, rows_[n] >= 0 && offset + l * 64 < launch_.row_bytes);
      }
    } else {
      fetch_pieces(start, offset);
    }
    if constexpr (F::kFormat == Format::kInt4) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int64_t at = static_cast<int64_t>(rows_[n]) * launch_.chunks() + chunk;
        ahead_.scale[n] = rows_[n] >= 0 ? __ldg(launch_.scale + at) : 0.0f;
      }
    }
  }

  // For rows that are not aligned, which are rare: one loop, in which what was read moves through the registers.
  __device__ __forceinline__ void fetch_pieces(int start, int64_t offset) {
#pragma unroll 1
    for (int i = 0; i < kTiles * F::kLoads; ++i) {
      const int row = row_of(index_of(start) + i / F::kLoads * 8);
      const int64_t at = offset + i % F::kLoads * 64;
      const int64_t left = row >= 0 ? launch_.row_bytes - at : 0;
      const uint4 read = load_pieces(launch_.weight + row * launch_.weight_stride + at, left, launch_.width);
#pragma unroll
      for (int j = 1; j < kTiles * F::kLoads; ++j)
        ahead_.at[(j - 1) / F::kLoads][(j - 1) % F::kLoads] = ahead_.at[j / F::kLoads][j % F::kLoads];
      ahead_.at[kTiles - 1][F::kLoads - 1] = read;
    }
  }

  __device__ __forceinline__ void add(const Words<F>& words, int chunk, Products<F>& sums) {
    const int64_t pitch = launch_.shared.hidden_pitch;
    const int g = lane() / 4, t = lane() % 4;
    if constexpr (F::kFormat == Format::kFloat) {
      sums.add(words, shared_ + chunk * kShape.bytes + t * 16, pitch, run_.size);
    } else {
      // Lanes without a vector of their own multiply another's, and nobody reads the result.
      const char* hidden = shared_ + chunk * kShape.chunk * 2 + t * 16;
      const int one = g < run_.size ? g : 0;
      const int other = launch_.split() ? one + launch_.columns : g + 8 < run_.size ? g + 8 : 0;
      const bool both = launch_.split() || run_.size > 8;
      sums.add(words, hidden + one * pitch, both ? hidden + other * pitch : nullptr);
    }
  }

  __device__ __forceinline__ void put(Products<F>& sums, int tile) {
    const int slice = warp() % kSlices, g = lane() / 4, t = lane() % 4, rows = launch_.tile_rows();
    float* to = reinterpret_cast<float*>(shared_ + launch_.shared.partial) +
                (tile % 2 * kSlices + slice) * launch_.vectors() * rows + warp() / kSlices * 8 * kTiles;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if constexpr (F::kFormat == Format::kFloat) {
        float even, odd;
        sums.share(n, even, odd);
        to[2 * t * rows + n * 8 + g] = even;
        to[(2 * t + 1) * rows + n * 8 + g] = odd;
      } else {
        float* at = to + g * rows + n * 8 + 2 * t;
        at[0] = sums.at[n][0];
        at[1] = sums.at[n][1];
        if (launch_.vectors() > 8) {
          at[8 * rows] = sums.at[n][2];
          at[8 * rows + 1] = sums.at[n][3];
        }
      }
    }
  }

  const Launch& launch_;
  const Run& run_;
  char* const shared_;
  int first_chunk_, end_chunk_;
  int rows_[kTiles];
  Words<F> ahead_;
};

}  // namespace specdec::head
