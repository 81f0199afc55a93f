// The weight is read once, in blocks of rows; logits live in a buffer of one block and are consumed while they are hot.
#include "head.h"

#include "head_dot.h"
#include "simd_math.h"

namespace specdec::SPECDEC_TIER {
namespace {

// A block of rows, resolved: where they are, what they are called, what is done to their products.
struct Block {
  int64_t start;  // index of the first among the R rows
  int size;
  int unknown;  // how many of them the weight does not have
  int32_t row[kHeadBlock];
  int32_t id[kHeadBlock];
  int32_t unknown_at[kHeadBlock];
  float scale[kHeadBlock];
  float bias[kHeadBlock];
};

template <typename T>
SPECDEC_INLINE float load_one(const T* p) {
  float lanes[kWidth];
  store(lanes, load(p, 1, 0.0f));
  return lanes[0];
}

SPECDEC_INLINE bool known(const HeadArgs& args, int32_t row) { return row >= 0 && row < args.height; }

SPECDEC_INLINE const int32_t* rows_of(const HeadArgs& args, int64_t b) {
  return args.rows == nullptr ? nullptr : args.rows + b * args.rows_stride;
}

void resolve(const HeadArgs& args, const int32_t* rows, int64_t start, Block* block) {
  block->start = start;
  block->size = static_cast<int>(args.count - start < kHeadBlock ? args.count - start : kHeadBlock);
  block->unknown = 0;
  for (int i = 0; i < block->size; ++i) {
    int32_t row = rows == nullptr ? static_cast<int32_t>(start + i) : rows[start + i];
    if (!known(args, row)) {
      block->unknown_at[block->unknown++] = i;
      row = 0;
    }
    block->row[i] = row;
    block->id[i] = args.token_ids == nullptr ? row : args.token_ids[row];
  }
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

// buffer[b * kHeadBlock + i] = row i of the block . hidden vector b.
template <typename Dot>
void multiply(const HeadArgs& args, const int32_t* rows, const Block& block, int64_t first, int64_t batch,
              float* buffer) {
  using Weight = typename Dot::Weight;
  const auto* weight = static_cast<const Weight*>(args.weight);
  const auto* hidden = static_cast<const typename Dot::Hidden*>(args.packed) + first * packed_stride(args.dim);
  for (int i = 0; i < block.size; i += kTileRows) {
    const Weight *tile[kTileRows], *ahead[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      tile[r] = weight + block.row[i + r < block.size ? i + r : block.size - 1] * args.weight_stride;
      // Gathered rows are out of reach of the hardware's prefetcher, so the next tile's are named one by one.
      const int64_t next = block.start + i + kTileRows + r;
      const int32_t row = next >= args.count ? 0 : rows == nullptr ? static_cast<int32_t>(next) : rows[next];
      ahead[r] = weight + (known(args, row) ? row : 0) * args.weight_stride;
    }
    dot_rows<Dot>(tile, ahead, hidden, batch, args.dim, buffer + i, kHeadBlock);
  }
}

SPECDEC_INLINE bool before(const HeadCandidate& a, const HeadCandidate& b) {
  return a.key > b.key || (a.key == b.key && a.id < b.id);
}

// The k best so far of one request.
struct Best {
  HeadCandidate* list;
  int32_t* found;
  int k;

  // What an fp32 key must reach to matter: below the k-th key by more than its own rounding.
  float threshold() const {
    if (*found < k) return -kInf;
    const double key = list[k - 1].key;
    return static_cast<float>(key - __builtin_fabs(key) * 0x1p-20 - 0x1p-20);
  }

  void insert(const HeadCandidate& candidate) {
    if (*found == k && !before(candidate, list[k - 1])) return;
    int i = *found < k ? (*found)++ : k - 1;
    for (; i > 0 && before(candidate, list[i - 1]); --i) list[i] = list[i - 1];
    list[i] = candidate;
  }
};

SPECDEC_INLINE float temperature_of(const HeadArgs& args, int64_t b) {
  return args.temperatures == nullptr ? args.temperature : args.temperatures[b];
}

SPECDEC_INLINE StreamKey stream_of(const HeadArgs& args, int64_t b) {
  constexpr uint32_t kDraft = 2;
  const uint64_t seed = static_cast<uint64_t>(args.seed[b]);
  const uint32_t row = args.row == nullptr ? 0 : static_cast<uint32_t>(args.row[b]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(args.offset[b]), kDraft,
          row};
}

// Products to logits, in place, padded with -inf to whole vectors. False where one of them is NaN or +inf.
bool finish_logits(const HeadArgs& args, const Block& block, float* logits, float* most) {
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

HeadSums sum_block(const float* logits, int size, float most, float temperature) {
  if (most == -kInf) return {most, 0.0f, 0.0f};
  Vec sum = set1(0.0f), weighted = set1(0.0f);
  for (int i = 0; i < size; i += kWidth) {
    // e^-105 is 0 in fp32, and so is the product: a logit of -inf adds nothing instead of 0 * inf.
    const Vec d = max(set1(-105.0f), div(sub(load(logits + i), set1(most)), set1(temperature)));
    const Vec e = exp(d);
    sum = add(sum, e);
    weighted = fma(e, d, weighted);
  }
  return {most, reduce_add(sum), reduce_add(weighted)};
}

// Offers what could be among the k best. `temperature` 0 draws nothing.
void offer(const HeadArgs& args, const Block& block, int64_t b, const float* logits, float most, float temperature,
           Best best) {
  const bool draws = args.seed != nullptr && temperature > 0.0f;
  const float reach = draws ? most / temperature + kMostNoise : most;
  if (most == -kInf || reach < best.threshold()) return;
  const StreamKey stream = draws ? stream_of(args, b) : StreamKey{};
  for (int i = 0; i < block.size; i += kWidth) {
    const Vec l = load(logits + i);
    Vec noise = set1(0.0f);
    Mask hopeful = both(gt(l, set1(-kInf)), ge(l, set1(best.threshold())));
    if (draws) {
      const Vec scaled = div(l, set1(temperature));
      // Noise is bounded, so most logits need none.
      hopeful = both(gt(l, set1(-kInf)), ge(add(scaled, set1(kMostNoise)), set1(best.threshold())));
      if (!any(hopeful)) continue;
      noise = gumbels(stream, iload(block.id + i));
      hopeful = both(hopeful, ge(add(scaled, noise), set1(best.threshold())));
    }
    uint32_t lanes = bits(hopeful);
    if (lanes == 0) continue;
    float added[kWidth];
    store(added, noise);
    for (; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      const double logit = logits[i + lane];
      best.insert({draws ? logit / temperature + added[lane] : logit, logits[i + lane], block.id[i + lane]});
    }
  }
}

// What becomes of one request's products with one block.
void consume(const HeadArgs& args, const Block& block, int64_t task, int64_t b, float* logits) {
  float most;
  const bool sound = finish_logits(args, block, logits, &most);
  if (args.all_logits != nullptr)
    __builtin_memcpy(args.all_logits + b * args.count + block.start, logits, sizeof(float) * block.size);
  HeadSums* sums = args.sums + b * args.blocks + block.start / kHeadBlock;
  if (!sound) {
    *sums = {kInf, __builtin_nanf(""), 0.0f};
    return;
  }
  const float temperature = temperature_of(args, b);
  *sums = sum_block(logits, block.size, most, temperature > 0.0f ? temperature : 1.0f);
  const int64_t slot = task * args.batch + b;
  offer(args, block, b, logits, most, temperature, {args.candidates + slot * args.k, args.found + slot, args.k});
}

template <typename Dot>
void scan_blocks(const HeadArgs& args, int64_t task, int64_t first_block, int64_t last_block) {
  float* buffer = args.buffer + task * kHeadGroup * kHeadBlock;
  Block block = {};
  for (int64_t index = first_block; index < last_block; ++index) {
    const bool shared = args.rows_stride == 0;
    if (shared) resolve(args, args.rows, index * kHeadBlock, &block);
    const int64_t group = shared ? kHeadGroup : 1;
    for (int64_t first = 0; first < args.batch; first += group) {
      const int32_t* rows = rows_of(args, first);
      if (!shared) resolve(args, rows, index * kHeadBlock, &block);
      const int64_t batch = args.batch - first < group ? args.batch - first : group;
      if (args.height > 0) multiply<Dot>(args, rows, block, first, batch, buffer);
      for (int64_t b = 0; b < batch; ++b) consume(args, block, task, first + b, buffer + b * kHeadBlock);
    }
  }
}

template <typename T>
SPECDEC_INLINE FmaDot<T> fma_dot(const T*) {
  return {};
}

// Calls f with the dot product that the tier uses for a dtype.
template <typename F>
SPECDEC_INLINE void with_dot(DType dtype, F&& f) {
#if defined(SPECDEC_TIER_AVX512BF16)
  if (dtype == DType::kBf16) return f(Bf16Dot{});
#endif
  with_dtype(dtype, [&](auto tag) { f(fma_dot(tag)); });
}

template <typename Dot>
void pack_typed(const HeadArgs& args) {
  const auto* hidden = static_cast<const typename Dot::Weight*>(args.hidden);
  auto* packed = static_cast<typename Dot::Hidden*>(args.packed);
  const int64_t stride = packed_stride(args.dim);
  for (int64_t b = 0; b < args.batch; ++b) {
    for (int64_t d = 0; d < args.dim; ++d) {
      const auto* from = hidden + b * args.hidden_strides[0] + d * args.hidden_strides[1];
      if constexpr (sizeof *from == sizeof *packed)
        packed[b * stride + d] = *from;
      else
        packed[b * stride + d] = load_one(from);
    }
    for (int64_t d = args.dim; d < stride; ++d) packed[b * stride + d] = {};
  }
}

int64_t packed_bytes(const HeadArgs& args) {
  return args.batch * packed_stride(args.dim) * static_cast<int64_t>(sizeof(float));
}

void pack(const HeadArgs& args) {
  with_dot(args.dtype, [&](auto dot) { pack_typed<decltype(dot)>(args); });
}

void scan(const HeadArgs& args, int64_t task, int64_t first_block, int64_t last_block) {
  with_dot(args.dtype, [&](auto dot) { scan_blocks<decltype(dot)>(args, task, first_block, last_block); });
}

void finish(const HeadArgs& args, int64_t b) {
  const HeadSums* sums = args.sums + b * args.blocks;
  const float given = temperature_of(args, b);
  const double temperature = given > 0.0f ? given : 1.0;
  double most = -__builtin_inf(), sum = 0.0, weighted = 0.0;
  for (int64_t i = 0; i < args.blocks; ++i)
    if (sums[i].max > most) most = sums[i].max;
  for (int64_t i = 0; i < args.blocks; ++i) {
    if (sums[i].sum == 0.0f) continue;
    const double shift = (sums[i].max - most) / temperature, factor = __builtin_exp(shift);
    sum += factor * sums[i].sum;
    weighted += factor * (sums[i].weighted + shift * sums[i].sum);
  }
  const bool broken = !(sum >= 0.0);
  args.lse[b] = static_cast<float>(sum == 0.0 ? -__builtin_inf() : most / temperature + __builtin_log(sum));
  args.entropy[b] = static_cast<float>(sum == 0.0 ? 0.0 : __builtin_log(sum) - weighted / sum);

  HeadCandidate list[kHeadMostK];
  int32_t found = 0;
  Best best = {list, &found, args.k};
  for (int64_t task = 0; task < args.tasks && !broken; ++task) {
    const int64_t slot = task * args.batch + b;
    for (int i = 0; i < args.found[slot]; ++i) best.insert(args.candidates[slot * args.k + i]);
  }
  for (int i = 0; i < args.k; ++i) {
    args.logits[b * args.k + i] = i < found ? list[i].logit : -kInf;
    args.tokens[b * args.k + i] = i < found ? list[i].id : -1;
  }
}

}  // namespace

extern const HeadKernels head_kernels;
const HeadKernels head_kernels = {packed_bytes, pack, scan, finish};

}  // namespace specdec::SPECDEC_TIER
