// Quantised weights of the head: tiles of rows meet hidden vectors a few at a time.
#include "head_quant.h"

#include "head_quant_dot.h"

namespace specdec::SPECDEC_TIER {
namespace {

// Rows that go together: alone, a hidden vector meets many, because many streams of memory saturate it where few do
// not.
template <typename Format>
constexpr int rows_beside(int batch) {
  return __is_same(Format, Int4Rows) ? 2 : batch == 1 ? 8 : 4;
}

template <typename Format, int Batch, bool Prefetch>
__attribute__((noinline)) void multiply_tile(const QuantTile& tile, float* out) {
  constexpr int kCount = rows_beside<Format>(Batch), kSums = kQuantRows * Batch;
  typename Format::Sum sums[Format::kPieces * kSums];
  double totals[kSums] = {};
  for (int64_t start = 0; start < tile.dim;) {
    const int64_t run = tile.dim - start < Format::kRun ? tile.dim : start + Format::kRun;
    for (auto& sum : sums) sum = Format::zero();
    for (; start < run; start += Format::kStretch) {
      const int64_t end = run - start < Format::kStretch ? run : start + Format::kStretch;
      for (int r = 0; r < kQuantRows; r += kCount)
        Format::template advance<kCount, Batch, Prefetch>(tile, r, start, end, sums);
    }
    start = run;
    for (int b = 0; b < Batch; ++b) Format::collect(sums + b * kQuantRows, kSums, totals + b * kQuantRows);
  }
  for (int b = 0; b < Batch; ++b) {
    const double unit = *reinterpret_cast<const double*>(tile.hidden + b * PackedLayout::kUnitBytes);
    for (int r = 0; r < kQuantRows; ++r)
      out[b * kHeadBlock + r] = static_cast<float>(totals[b * kQuantRows + r] * unit);
  }
}

// Any number of hidden vectors; only the first ones prefetch.
template <typename Format>
void multiply_rows(QuantTile tile, int64_t batch, int64_t vector_bytes, float* out) {
  const auto next = [&](auto kernel, int64_t count) {
    kernel(tile, out);
    tile.hidden += count * vector_bytes;
    out += count * kHeadBlock;
    batch -= count;
  };
  if (batch == 1) return next(multiply_tile<Format, 1, true>, 1);
  if (batch == 2) return next(multiply_tile<Format, 2, true>, 2);
  if (batch == 3) return next(multiply_tile<Format, 3, true>, 3);
  next(multiply_tile<Format, kQuantBatch, true>, kQuantBatch);
  while (batch >= kQuantBatch) next(multiply_tile<Format, kQuantBatch, false>, kQuantBatch);
  if (batch == 1) return next(multiply_tile<Format, 1, false>, 1);
  if (batch == 2) return next(multiply_tile<Format, 2, false>, 2);
  if (batch == 3) return next(multiply_tile<Format, 3, false>, 3);
}

template <typename F>
SPECDEC_INLINE void with_format(HeadWeight kind, F&& f) {
  if (kind == HeadWeight::kInt8) return f(Int8Rows{});
  if (kind == HeadWeight::kFp8) return f(Fp8Rows{});
  return f(Int4Rows{});
}

}  // namespace

int64_t packed_quantised_bytes(const HeadArgs& args) { return args.batch * packed_layout(args).vector_bytes(); }

void pack_quantised(const HeadArgs& args, const HeadRun& run) {
  with_dtype(args.dtype, [&](auto tag) { pack_run(args, run, static_cast<decltype(tag)>(args.hidden)); });
}

void multiply_quantised(const HeadArgs& args, const HeadRun& run, const int32_t* rows, int64_t start,
                        const int32_t* row, int size, float* out) {
  const PackedLayout layout = packed_layout(args);
  const int64_t groups = args.kind == HeadWeight::kInt4 ? layout.pieces : 0;
  const auto* weight = static_cast<const uint8_t*>(args.weight);
  QuantTile tile;
  tile.dim = args.dim;
  tile.hidden = static_cast<const char*>(args.packed) + run.first * layout.vector_bytes();
  for (int i = 0; i < size; i += kQuantRows) {
    for (int r = 0; r < kQuantRows; ++r) {
      const int64_t here = row[i + r < size ? i + r : size - 1], next = start + i + kQuantRows + r;
      const int32_t named = next >= args.count ? 0 : rows == nullptr ? static_cast<int32_t>(next) : rows[next];
      const int64_t ahead = named >= 0 && named < args.height ? named : 0;
      tile.row[r] = weight + here * args.weight_stride;
      tile.ahead[r] = weight + ahead * args.weight_stride;
      tile.scales[r] = args.group_scale + here * groups;
      tile.ahead_scales[r] = args.group_scale + ahead * groups;
    }
    with_format(args.kind,
                [&](auto format) { multiply_rows<decltype(format)>(tile, run.size, layout.vector_bytes(), out + i); });
  }
}

}  // namespace specdec::SPECDEC_TIER
