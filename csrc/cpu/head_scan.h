// The weight is read once, in blocks of rows; logits live in a buffer of one block and are consumed while they are hot.
#pragma once

#include "head_best.h"
#include "head_dot.h"
#include "head_quant.h"
#include "head_sums.h"

namespace specdec::SPECDEC_TIER {

// A block of rows, resolved: where they are, what they are called, what is done to their products.
struct Block {
  int64_t start;  // index of the first among the R rows
  int size;
  int unknown;              // how many of them the weight does not have
  int32_t row[kHeadBlock];  // the last is repeated to whole tiles
  int32_t id[kHeadBlock];
  int32_t unknown_at[kHeadBlock];
  float scale[kHeadBlock];
  float bias[kHeadBlock];
};

SPECDEC_INLINE bool known(const HeadArgs& args, int32_t row) { return row >= 0 && row < args.height; }

// The rows that a run looks at; null: all in order.
SPECDEC_INLINE const int32_t* rows_of(const HeadArgs& args, const HeadRun& run) {
  return args.rows == nullptr || run.line < 0 ? nullptr : args.rows + run.line * args.count;
}

SPECDEC_INLINE float temperature_of(const HeadArgs& args, int64_t b) {
  return args.temperatures == nullptr ? args.temperature : args.temperatures[b];
}

SPECDEC_INLINE void resolve(const HeadArgs& args, const HeadRun& run, int64_t start, Block* block) {
  const int32_t* rows = rows_of(args, run);
  block->start = start;
  block->size = static_cast<int>(args.count - start < kHeadBlock ? args.count - start : kHeadBlock);
  block->unknown = 0;
  for (int i = 0; i < block->size; ++i) {
    int32_t row = rows == nullptr ? static_cast<int32_t>(start + i) : rows[start + i];
    if (run.line < 0 || !known(args, row)) {
      block->unknown_at[block->unknown++] = i;
      row = 0;
    }
    block->row[i] = row;
    block->id[i] = args.token_ids == nullptr ? row : args.token_ids[row];
  }
  for (int i = block->size; i < kHeadBlock && i < block->size + kMostTileRows; ++i)
    block->row[i] = block->row[block->size - 1];
  if (args.height == 0) return;
  if (args.scale != nullptr)
    for (int i = 0; i < block->size; ++i) block->scale[i] = args.scale[block->row[i]];
  if (args.bias != nullptr) {
    with_dtype(args.bias_dtype, [&](auto tag) {
      const auto bias = static_cast<decltype(tag)>(args.bias);
      for (int i = 0; i < block->size; ++i) block->bias[i] = load_one(bias + block->row[i]);
    });
  }
}

// buffer[b * kHeadBlock + i] = row i of the block . hidden vector b of the run.
template <typename Dot>
void multiply(const HeadArgs& args, const HeadRun& run, const Block& block, float* buffer) {
  using Weight = typename Dot::Weight;
  const auto* weight = static_cast<const Weight*>(args.weight);
  const auto* hidden = static_cast<const typename Dot::Hidden*>(args.packed) + run.first * Dot::hidden_stride(args.dim);
  const int32_t* rows = rows_of(args, run);
  if (args.kind != HeadWeight::kPlain)
    return multiply_quantised(args, run, rows, block.start, block.row, block.size, buffer);
  const int together = Dot::tile_rows(run.size);
  for (int i = 0; i < block.size; i += together) {
    RowTile<Weight> tile;
    for (int r = 0; r < together; ++r) {
      tile.row[r] = weight + block.row[i + r] * args.weight_stride;
      // Gathered rows are out of reach of the hardware's prefetcher, so the next tile's are named one by one.
      const int64_t next = block.start + i + together + r;
      const int32_t row = next >= args.count ? 0 : rows == nullptr ? static_cast<int32_t>(next) : rows[next];
      tile.ahead[r] = weight + (known(args, row) ? row : 0) * args.weight_stride;
    }
    Dot::multiply(tile, hidden, run.size, args.dim, buffer + i, kHeadBlock);
  }
}

// Products to logits, in place, padded with -inf to whole vectors. False where one of them is NaN or +inf.
SPECDEC_INLINE bool finish_logits(const HeadArgs& args, const Block& block, float* logits, float* most) {
  const int padded = (block.size + kWidth - 1) / kWidth * kWidth;
  if (args.height > 0) {
    for (int i = 0; i < block.size; i += kWidth) {
      const int n = block.size - i < kWidth ? block.size - i : kWidth;
      Vec l = load(logits + i);
      if (args.scale != nullptr) l = mul(l, load(block.scale + i, n, 1.0f));
      if (args.bias != nullptr) l = add(l, load(block.bias + i, n, 0.0f));
      store(logits + i, l);
    }
  }
  for (int j = 0; j < block.unknown; ++j) logits[block.unknown_at[j]] = -kInf;
  for (int i = block.size; i < padded; ++i) logits[i] = -kInf;
  Vec largest = set1(-kInf);
  Mask broken = first(0);
  for (int i = 0; i < padded; i += kWidth) {
    const Vec l = load(logits + i);
    broken = either(broken, not_lt(l, set1(kInf)));
    largest = max(l, largest);
  }
  *most = reduce_max(largest);
  return !any(broken);
}

// What becomes of one request's products with one block.
SPECDEC_INLINE void consume(const HeadArgs& args, const Block& block, int64_t task, int64_t b, float* logits) {
  float most;
  const bool sound = finish_logits(args, block, logits, &most);
  if (args.all_logits != nullptr)
    __builtin_memcpy(args.all_logits + b * args.count + block.start, logits, sizeof(float) * block.size);
  HeadSums* sums = args.sums + b * args.blocks + block.start / kHeadBlock;
  if (!sound) {
    const double nan = __builtin_nan("");
    *sums = {nan, nan, nan};
    return;
  }
  const float temperature = temperature_of(args, b);
  *sums = sum_block(logits, block.size, most, power_scale(temperature));
  const int64_t slot = task * args.batch + b;
  const Best best = {args.candidates + slot * args.k, args.found + slot, args.k};
  offer(args, b, logits, block.id, block.size, most, temperature, best);
}

template <typename Dot>
void scan_items(const HeadArgs& args, int64_t task, int64_t first_item, int64_t last_item) {
  float* buffer = args.buffer + task * kHeadRun * kHeadBlock;
  Block block;
  for (int64_t item = first_item; item < last_item; ++item) {
    // Rows that all look at are in the cache for the next run; of rows of its own, a run reads the next block.
    const int64_t index = args.shared_rows ? item / args.run_count : item % args.blocks;
    const HeadRun& run = args.runs[args.shared_rows ? item % args.run_count : item / args.blocks];
    resolve(args, run, index * kHeadBlock, &block);
    if (block.unknown < block.size) multiply<Dot>(args, run, block, buffer);
    for (int64_t b = 0; b < run.size; ++b) consume(args, block, task, run.first + b, buffer + b * kHeadBlock);
  }
}

}  // namespace specdec::SPECDEC_TIER
