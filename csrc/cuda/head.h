// The drafter's head on CUDA: what one launch is told, and how its memory is laid out. Plain C++, so that the device
// code also runs where there is no GPU (tests/cuda_host.h).
//
// Two kernels. In the first, thread blocks share out the rows of the weight, and within one the warps share out the
// columns: each multiplies its slice of every row, so that all have work to the last row however few rows there are.
// When a tile of rows is multiplied, each warp adds up the slices of other requests, and keeps their sums and best
// tokens. The second kernel merges what the thread blocks found.
//
// How many bytes are under way: HBM of an H200 delivers 4.8 TB/s and answers after about 600 ns unloaded, so 2.9 MB
// must be asked for at any time, 22 KB on each of 132 multiprocessors; under load, when answers take 1 us, 36 KB. A
// warp asks for the next 4 KB (8 vectors of 16 bytes in every lane; of int4 2 KB) before it multiplies the last ones,
// from tile to tile as well. 16 warps on a multiprocessor (two thread blocks of 8, or one of 16 where shared memory
// holds only one) have 64 KB under way at any time, of int4 32, for 64 of the 128 registers that a thread of 16 warps
// may have.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "specdec/macros.h"

namespace specdec::head {

constexpr int kLanes = 32;
constexpr int kSlices = 8;         // of the columns; sums of slices are added in order, so they fix a logit's bits
constexpr int kGroups = 2;         // at most: of kSlices warps, each with rows of its own
constexpr int kMostRequests = 32;  // of one launch
constexpr int kMostK = 64;
constexpr int kRunBytes = 48;  // what a thread block knows of its work, in its shared memory

enum class DType : int32_t { kFloat, kBf16, kHalf };
enum class Format : int32_t { kFloat, kBf16, kHalf, kInt8, kFp8, kInt4 };

// Columns that a warp takes at a time, rows beside each other (in eights), bytes of a row's chunk.
struct Shape {
  int chunk, tiles, bytes;
};
SPECDEC_HD constexpr Shape shape_of(Format format) {
  switch (format) {
    case Format::kFloat:
      return {64, 2, 256};
    case Format::kBf16:
    case Format::kHalf:
      return {128, 2, 256};
    case Format::kInt4:
      return {128, 4, 64};
    default:
      return {256, 2, 256};
  }
}

// Sums over t = logit log2(e) / temperature: `anchor` is the integer part of the largest t, -inf where there is none;
// sum of 2^(t - anchor), and of 2^(t - anchor) (t - anchor). NaN where a logit was NaN or +inf.
struct Sums {
  double anchor, sum, weighted;
};

// Where things lie in the shared memory of a thread block, in bytes from its start.
struct Shared {
  int64_t hidden_pitch;  // of a hidden vector; they come first, their low parts behind all of them
  int64_t run, partial, facts, sums, states, keys, logits, ids, end;
};

struct Launch {
  Format format;
  const char* hidden;                  // [batch, dim]
  int64_t hidden_stride, hidden_step;  // bytes
  DType hidden_type;
  const char* weight;  // [height, row_bytes]
  int64_t weight_stride, row_bytes;
  int32_t width;               // bytes that a load may take at a time: 16, or 4, 2, 1 where rows are not aligned
  int32_t dim, height, count;  // D, V, R

  const int32_t* rows;  // [lists, R]
  int64_t rows_stride;
  const int32_t* row_groups;  // [batch], list of each request; null: request b has list b, or all have the only one
  int32_t lists;              // of rows; -1: there is none, and all rows are looked at in order
  const int32_t* token_ids;   // [height] or null
  const char* bias;           // [height] or null
  DType bias_type;
  const float* scale;  // [height] or null; of kInt4 [height, chunks]

  float temperature;
  const float* temperatures;  // [batch] or null
  int32_t batch, k;
  const int64_t *seed, *offset;  // [batch]; null: nothing is drawn
  const int32_t* row;            // [batch] or null

  float* out_logits;             // [batch, k]
  int32_t* out_tokens;           // [batch, k]
  float *out_lse, *out_entropy;  // [batch], or null: a part of a head, whose keys and sums are wanted
  double* out_keys;              // [batch, k]
  Sums* out_sums;                // [batch]
  float* all_logits;             // [batch, R] or null

  // How the work is shared out.
  int32_t blocks;   // thread blocks, at least as many as runs of requests
  int32_t groups;   // of warps
  int32_t columns;  // requests that meet a row while it is in registers
  Shared shared;

  // Scratch: what each thread block found, best first, and its sums.
  double* found_keys;   // [batch, k, blocks]
  float* found_logits;  // the same
  int32_t* found_ids;   // the same
  Sums* found_sums;     // [batch, blocks]

  // fp32 hidden vectors beside a quantised weight are sums of two vectors of bf16.
  SPECDEC_HD bool split() const { return hidden_type == DType::kFloat && format != Format::kFloat; }
  SPECDEC_HD int chunks() const { return (dim + shape_of(format).chunk - 1) / shape_of(format).chunk; }
  SPECDEC_HD int tile_rows() const { return 8 * shape_of(format).tiles * groups; }
  // Vectors that warps multiply: requests, or twice as many where they are split.
  SPECDEC_HD int vectors() const { return columns > 8 || split() ? 16 : 8; }
  SPECDEC_HD int threads() const { return kSlices * groups * kLanes; }
  // Entries of a list that is cut down to the k best when it is full.
  SPECDEC_HD int capacity() const { return k <= 32 ? 64 : 128; }
};
static_assert(sizeof(Launch) <= 4096, "kernel parameters are limited to 4 KB");

// What a thread block keeps of a request beside its sums and its list.
struct State {
  float temperature;  // 0: nothing is drawn
  float reach;        // an fp32 key below this cannot be among the k best
  double slope;       // log2(e) / temperature
  double last;        // the k-th best key
  uint64_t seed, offset;
  uint32_t row;
  int32_t count;  // entries of the list
};

// The most requests that can share a row: the rows of a matrix product.
SPECDEC_HD int most_columns(const Launch& launch) { return launch.format == Format::kFloat || launch.split() ? 8 : 16; }

// Bytes of shared memory for `columns` requests and `groups` of warps; sets both, and the offsets.
inline int64_t lay_out_shared(Launch& launch, int columns, int groups) {
  launch.columns = columns;
  launch.groups = groups;
  const int64_t padded = static_cast<int64_t>(launch.chunks()) * shape_of(launch.format).chunk;
  Shared& s = launch.shared;
  // 64 bytes more than whole lines: eight lanes that read 16 bytes of two neighbouring vectors meet no bank twice.
  s.hidden_pitch = launch.format == Format::kFloat ? padded * 4 : padded * 2 + 64;
  int64_t used = s.hidden_pitch * (launch.split() ? 2 : 1) * columns;
  auto take = [&](int64_t& offset, int64_t bytes) {
    offset = used;
    used += (bytes + 15) / 16 * 16;
  };
  const int64_t entries = static_cast<int64_t>(columns) * launch.capacity();
  take(s.run, kRunBytes);
  // Two of each, in turn: a tile is read while the next one is written.
  take(s.partial, int64_t{2} * kSlices * launch.vectors() * launch.tile_rows() * 4);
  take(s.facts, int64_t{2} * 4 * launch.tile_rows() * 4);
  take(s.sums, int64_t{3} * columns * kLanes * 8);
  take(s.states, columns * static_cast<int64_t>(sizeof(State)));
  take(s.keys, entries * 8);
  take(s.logits, entries * 4);
  take(s.ids, entries * 4);
  s.end = used;
  return used;
}

// As many requests beside each other, and warps, as shared memory has room for: of a multiprocessor, and of a thread
// block of it. False where not even one hidden vector fits. No result depends on it.
inline bool fit(Launch& launch, int64_t of_multiprocessor, int64_t of_block) {
  constexpr int64_t kSystem = 1024;  // of each thread block
  const int together = launch.lists <= 1 || launch.row_groups != nullptr ? launch.batch : 1;
  int columns = 1;
  while (columns < together && columns < most_columns(launch)) columns *= 2;
  for (; columns > 0; columns /= 2) {
    const int64_t bytes = lay_out_shared(launch, columns, 1);
    if (bytes <= of_block && 2 * (bytes + kSystem) <= of_multiprocessor) return true;
    for (int groups = kGroups; groups > 0; --groups)
      if (lay_out_shared(launch, columns, groups) <= of_block) return true;
  }
  return false;
}

// Requests first .. first + size - 1 of a launch without its scratch.
inline Launch part_of(const Launch& all, int64_t first, int32_t size) {
  Launch part = all;
  auto advance = [&](auto*& pointer, int64_t count) {
    if (pointer != nullptr) pointer += first * count;
  };
  part.batch = size;
  advance(part.hidden, all.hidden_stride);
  if (all.row_groups == nullptr && all.lists > 1) {
    advance(part.rows, all.rows_stride);
    part.lists = size;
  }
  advance(part.row_groups, 1);
  advance(part.temperatures, 1);
  advance(part.seed, 1);
  advance(part.offset, 1);
  advance(part.row, 1);
  advance(part.out_logits, all.k);
  advance(part.out_tokens, all.k);
  advance(part.out_lse, 1);
  advance(part.out_entropy, 1);
  advance(part.out_keys, all.k);
  advance(part.out_sums, 1);
  advance(part.all_logits, all.count);
  return part;
}

// Bytes that a load of a row may take: all of its addresses are multiples of that.
inline int32_t width_of(const Launch& launch) {
  const uint64_t address = reinterpret_cast<uintptr_t>(launch.weight) | static_cast<uint64_t>(launch.weight_stride) |
                           static_cast<uint64_t>(launch.row_bytes);
  for (const int32_t width : {16, 4, 2})
    if (address % static_cast<uint64_t>(width) == 0) return width;
  return 1;
}

// Shared memory of a warp that merges: one list.
inline int64_t merge_bytes(const Launch& launch) { return int64_t{16} * launch.capacity(); }

// Lays the scratch of `launch` out from `base` on, which may be null; returns its bytes.
inline int64_t lay_out_scratch(Launch& launch, char* base) {
  int64_t used = 0;
  auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<decltype(+pointer)>(base + used);
    used += (count * static_cast<int64_t>(sizeof(*pointer)) + 15) / 16 * 16;
  };
  const int64_t lists = static_cast<int64_t>(launch.batch) * launch.blocks;
  take(launch.found_sums, lists);
  take(launch.found_keys, lists * launch.k);
  take(launch.found_logits, lists * launch.k);
  take(launch.found_ids, lists * launch.k);
  return used;
}

}  // namespace specdec::head
