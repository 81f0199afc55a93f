// Hidden vectors as products with quantised rows read them. For tier files only.
#pragma once

#include "head.h"
#include "simd.h"

namespace specdec::SPECDEC_TIER {

constexpr int kQuantBatch = kWidth == 16 ? 4 : 3;  // hidden vectors whose sums fit into registers beside rows
constexpr int kLanes = 16;                         // sums of an int4 row, whatever the tier's width

// A packed vector is one number, what a product of the others is multiplied with, and pieces of columns, padded with
// zeros. Vectors that meet rows together take turns by the piece: apart by a power of two, they would contend for the
// same sets of the first level of the cache. A piece of int4 is a group, in the order in which its nibbles come out:
// even bytes before odd ones, and of each the low nibbles (columns 0..63) before the high ones.
struct PackedLayout {
  int64_t columns;  // of a piece
  int64_t bytes;    // of a piece
  int64_t pieces;

  static constexpr int64_t kUnitBytes = 64;

  int64_t vector_bytes() const { return kUnitBytes + pieces * bytes; }
};

SPECDEC_INLINE PackedLayout packed_layout(const HeadArgs& args) {
  const int64_t columns = args.kind == HeadWeight::kInt4 ? kHeadColumns : 64;
  const int64_t width = args.kind == HeadWeight::kFp8 ? sizeof(float) : sizeof(int16_t);
  return {columns, columns * width, (args.dim + columns - 1) / columns};
}

SPECDEC_INLINE int64_t int4_place(int column) { return (column % 2 * 2 + column / 64) * 2 * kLanes + column % 64 / 2; }

// Calls f(i, values, n) for the columns of piece i, in fp32.
template <typename T, typename F>
SPECDEC_INLINE void each_piece(const HeadArgs& args, const PackedLayout& layout, const T* hidden, F&& f) {
  float values[kHeadColumns];
  for (int64_t i = 0; i < layout.pieces; ++i) {
    const int64_t d = i * layout.columns;
    const int n = static_cast<int>(args.dim - d < layout.columns ? args.dim - d : layout.columns);
    const int64_t step = args.hidden_strides[1];
    for (int j = 0; j < n; j += kWidth) {
      const T* from = hidden + (d + j) * step;
      const int left = n - j < kWidth ? n - j : kWidth;
      T gathered[kWidth] = {};
      for (int lane = 0; lane < left && step != 1; ++lane) gathered[lane] = from[lane * step];
      store(values + j, load(step == 1 ? from : gathered, left, 0.0f));
    }
    f(i, values, n);
  }
}

// Packs a vector: its unit, and its pieces `stride` bytes apart.
template <typename T>
void pack_vector(const HeadArgs& args, const PackedLayout& layout, const T* hidden, double* unit, char* pieces,
                 int64_t stride) {
  float most = 0.0f;
  bool finite = true;
  each_piece(args, layout, hidden, [&](int64_t, const float* values, int n) {
    for (int j = 0; j < n; ++j) {
      const float size = __builtin_fabsf(values[j]);
      finite = finite && size < kInf;
      most = size > most ? size : most;
    }
  });
  // A vector with NaN or an infinity breaks every product by its unit.
  *unit = __builtin_nan("");
  if (!finite) return;
  if (args.kind == HeadWeight::kFp8) {
    *unit = 256.0;  // see fp8_over_256
    each_piece(args, layout, hidden, [&](int64_t i, const float* values, int n) {
      __builtin_memcpy(pieces + i * stride, values, n * sizeof(float));
    });
    return;
  }
  *unit = most / 32767.0;
  if (most == 0.0f) return;
  const double scale = 32767.0 / most;
  each_piece(args, layout, hidden, [&](int64_t i, const float* values, int n) {
    auto* words = reinterpret_cast<int16_t*>(pieces + i * stride);
    for (int j = 0; j < n; ++j) {
      // To the nearest: adding 1.5 * 2^52 leaves no room for a fraction.
      const auto word = static_cast<int16_t>(static_cast<int32_t>(values[j] * scale + 0x1.8p52 - 0x1.8p52));
      words[args.kind == HeadWeight::kInt4 ? int4_place(j) : j] = word;
    }
  });
}

// Packs the vectors of a run, at most kQuantBatch taking turns.
template <typename T>
void pack_run(const HeadArgs& args, const HeadRun& run, const T* hidden) {
  const PackedLayout layout = packed_layout(args);
  char* to = static_cast<char*>(args.packed) + run.first * layout.vector_bytes();
  __builtin_memset(to, 0, run.size * layout.vector_bytes());
  for (int64_t first = 0; first < run.size; first += kQuantBatch) {
    const int64_t batch = run.size - first < kQuantBatch ? run.size - first : kQuantBatch;
    char* pieces = to + batch * PackedLayout::kUnitBytes;
    for (int64_t b = 0; b < batch; ++b) {
      const T* vector = hidden + (run.first + first + b) * args.hidden_strides[0];
      pack_vector(args, layout, vector, reinterpret_cast<double*>(to + b * PackedLayout::kUnitBytes),
                  pieces + b * layout.bytes, batch * layout.bytes);
    }
    to += batch * layout.vector_bytes();
  }
}

}  // namespace specdec::SPECDEC_TIER
