// One job: blocks of slots, each scored, softened and multiplied with its values while it is in the cache.
//
// Most rows go in sets of kWidth, one row in each lane: scores are [slot][lane] and values [column][lane], so that keys
// and values are read where they lie, a word at a time, and the softmax never crosses lanes. A rest of few rows would
// leave most lanes empty; it is done row by row, with slots and columns in the lanes.
#include "attention.h"

#include "attention_softmax.h"
#include "attention_stage.h"

namespace specdec::SPECDEC_TIER {
namespace {

constexpr int64_t kMostRest = kWidth - kWidth / 4;  // a rest of more rows than this fills a set
constexpr double kLog2E = 0x1.71547652b82fep0;

SPECDEC_INLINE int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

// A thread's scratch, the sizes of which depend on the call alone.
struct Scratch {
  int64_t key_columns, value_columns;  // padded
  char *lane_query, *rest_query, *keys, *values, *packed;
  float *scores, *lane_values, *rest_values, *most, *sum;
  char* weights;
  uint64_t* seen;
  int64_t bytes = 0;

  Scratch(const AttentionArgs& args, char* base) : base_(base) {
    key_columns = round_up(args.keys.columns, 32);
    value_columns = round_up(args.values.columns, 16);
    const int64_t rows = args.job_rows, rest = kMostRest + 4, lanes = 2 * kWidth > rest ? 2 * kWidth : rest;
    take(&lane_query, rows * key_columns * 4);
    take(&rest_query, rest * key_columns * 4);
    take(&keys, kAttentionBlock * key_columns * 4);
    take(&values, kAttentionBlock * value_columns * 4);
    take(&packed, kAttentionBlock * value_columns * 2);
    take(&scores, kAttentionBlock * lanes);
    take(&weights, kAttentionBlock * lanes * 2);
    take(&lane_values, rows * value_columns);
    take(&rest_values, rest * value_columns);
    take(&most, rows + rest);
    take(&sum, rows + rest);
    take(&seen, rows + rest);
  }

 private:
  template <typename T>
  void take(T** pointer, int64_t count) {
    *pointer = reinterpret_cast<T*>(base_ + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }

  char* base_;
};

// The slots from `from` to `to` of a block, as bits.
SPECDEC_INLINE uint64_t slots_between(int64_t from, int64_t to) {
  if (from < 0) from = 0;
  if (to > kAttentionBlock) to = kAttentionBlock;
  if (from >= to) return 0;
  return (to == kAttentionBlock ? ~uint64_t{0} : (uint64_t{1} << to) - 1) & ~((uint64_t{1} << from) - 1);
}

// The first slot of the prefix that a window leaves to a node.
SPECDEC_INLINE int64_t first_seen(const AttentionArgs& args, const AttentionJob& job, const AttentionNode& node) {
  int64_t first = job.first_slot;
  if (!job.shared && node.shared > first) first = node.shared;
  if (args.window == 0) return first;
  const int64_t reach = node.prefix + args.depths[node.node] - args.window + 1;
  return reach > first ? reach : first;
}

SPECDEC_INLINE int64_t prefix_end(const AttentionJob& job, const AttentionNode& node) {
  const int64_t end = job.shared ? node.shared : node.prefix;
  return end < job.last_slot ? end : job.last_slot;
}

// Which slots of the block at `start` a node sees.
uint64_t seen_slots(const AttentionArgs& args, const AttentionJob& job, const AttentionNode& node, int64_t start) {
  uint64_t seen = slots_between(first_seen(args, job, node) - start, prefix_end(job, node) - start);
  if (job.shared || start + kAttentionBlock <= node.prefix) return seen;
  const uint64_t* words = args.bits + node.node * args.words;
  const int64_t j = start - node.prefix;  // the tree's node at the block's first slot
  uint64_t tree = 0;
  if (j < 0) {
    tree = words[0] << -j;
  } else {
    const int64_t word = j / 64, shift = j % 64;
    if (word < args.words) tree = words[word] >> shift;
    if (shift != 0 && word + 1 < args.words) tree |= words[word + 1] << (64 - shift);
  }
  const int64_t low = node.prefix > job.first_slot ? node.prefix : job.first_slot;
  const int64_t end = node.prefix + node.size, high = end < job.last_slot ? end : job.last_slot;
  tree &= slots_between(low - start, high - start);
  // Positions, not slots: siblings stand at different slots but at one distance.
  const int64_t depth = args.depths == nullptr ? 0 : args.depths[node.node];
  if (args.window != 0 && depth >= args.window) {
    for (uint64_t left = tree; left != 0; left &= left - 1) {
      const int bit = __builtin_ctzll(left);
      if (depth - args.depths[node.first + j + bit] >= args.window) tree &= ~(uint64_t{1} << bit);
    }
  }
  return seen | tree;
}

template <typename Math>
class Job {
  using Element = typename Math::Element;

 public:
  Job(const AttentionArgs& args, const AttentionJob& job, void* base)
      : args_(args), job_(job), s_(args, static_cast<char*>(base)) {
    const int64_t rest = job.at.rows % kWidth;
    rest_ = rest > kMostRest ? 0 : rest;
    sets_ = (job.at.rows - rest_ + kWidth - 1) / kWidth;
    key_words_ = round_up(args.keys.columns, Math::kPack) / Math::kPack;
    double factor = args.scale;
    if (args.keys.scale != nullptr) factor *= args.keys.scale[job.at.kv_head];
    sign_ = factor < 0.0 ? -1.0f : 1.0f;
    // Scores that are all equal still need a factor under which -inf stays what it is.
    factor = factor * sign_ > 0x1p-120 ? factor * sign_ : 0x1p-120;
    scale_ = {static_cast<float>(factor * kLog2E), 0.0f, 0.0f};
    if (args.softcap != 0.0)
      scale_ = {1.0f, static_cast<float>(factor / args.softcap), static_cast<float>(args.softcap * kLog2E)};
  }

  void run() {
    pack_query();
    const int64_t rows = sets_ * kWidth + rest_;
    for (int64_t r = 0; r < rows; ++r) {
      s_.most[r] = kNothingSeen;
      s_.sum[r] = 0.0f;
    }
    zero(s_.lane_values, sets_ * kWidth * s_.value_columns);
    zero(s_.rest_values, kWidth * s_.value_columns);
    find_limits();
    for (int64_t start = job_.first_slot / kAttentionBlock * kAttentionBlock; start < job_.last_slot;
         start += kAttentionBlock)
      block(start);
    write();
  }

 private:
  const AttentionNode& node_of(int64_t r) const {
    const int64_t row = r < job_.at.rows ? r : job_.at.rows - 1;
    return job_.at.nodes[(job_.at.first_row + row) / args_.group];
  }

  static void zero(float* p, int64_t count) { __builtin_memset(p, 0, count * sizeof(float)); }

  // Rows of the query as words: of a set [word][lane], of the rest [row][word].
  void pack_query() {
    with_dtype(args_.query_type, [&](auto tag) {
      const auto* query = static_cast<decltype(tag)>(args_.query);
      auto* row = reinterpret_cast<Element*>(s_.keys);  // not in use yet
      for (int64_t r = 0; r < sets_ * kWidth + rest_; ++r) {
        const bool real = r < job_.at.rows;
        const int64_t index = job_.at.first_row + r, head = job_.at.kv_head * args_.group + index % args_.group;
        for (int64_t d = 0; d < s_.key_columns; d += kWidth) {
          const int64_t left = real ? args_.keys.columns - d : 0;
          const int n = static_cast<int>(left < 0 ? 0 : left < kWidth ? left : kWidth);
          Vec x = set1(0.0f);
          if (n > 0) x = load(query + node_of(r).node * args_.query_node + head * args_.query_head + d, n, 0.0f);
          put(row + d, mul(x, set1(sign_)));
        }
        if (r >= sets_ * kWidth) {
          __builtin_memcpy(s_.rest_query + (r - sets_ * kWidth) * rest_stride(), row, rest_stride());
          continue;
        }
        char* to = s_.lane_query + (r / kWidth * key_words_ * kWidth + r % kWidth) * 4;
        for (int64_t w = 0; w < key_words_; ++w, to += kWidth * 4) __builtin_memcpy(to, row + w * Math::kPack, 4);
      }
    });
    // Rows are multiplied four at a time.
    __builtin_memset(s_.rest_query + rest_ * rest_stride(), 0, 3 * rest_stride());
  }

  int64_t rest_stride() const { return s_.key_columns * static_cast<int64_t>(sizeof(Element)); }

  // Between these slots every row sees everything.
  void find_limits() {
    all_from_ = job_.first_slot;
    all_to_ = job_.last_slot;
    const AttentionNode* last = nullptr;
    for (int64_t r = 0; r < job_.at.rows; ++r) {
      const AttentionNode& node = node_of(r);
      if (&node == last) continue;
      last = &node;
      const int64_t from = first_seen(args_, job_, node), to = prefix_end(job_, node);
      if (from > all_from_) all_from_ = from;
      if (to < all_to_) all_to_ = to;
    }
  }

  void block(int64_t start) {
    uint64_t seen = ~uint64_t{0}, by_all = seen;
    if (start < all_from_ || start + kAttentionBlock > all_to_) {
      seen = 0;
      const AttentionNode* last = nullptr;
      for (int64_t r = 0; r < sets_ * kWidth + rest_; ++r) {
        const AttentionNode& node = node_of(r);
        s_.seen[r] = &node == last ? s_.seen[r - 1] : seen_slots(args_, job_, node, start);
        last = &node;
        seen |= s_.seen[r];
        by_all &= s_.seen[r];
      }
      if (seen == 0) return;
    }
    const bool whole = by_all == ~uint64_t{0};
    // Slots behind the last visible one are left out, but for those that fill a tile.
    slots_ = round_up(64 - __builtin_clzll(seen), 16);
    uint64_t broken = 0;
    keys_ = {s_.keys, rest_stride()};
    values_ = {s_.values, s_.value_columns * static_cast<int64_t>(sizeof(Element))};
    if (whole && lies_ready<Element>(args_, args_.keys) && args_.keys.columns % Math::kPack == 0)
      keys_ = in_place(args_.keys, start);
    else
      stage_block(args_, job_, args_.keys, start, seen, reinterpret_cast<Element*>(s_.keys), s_.key_columns);
    if (whole && lies_ready<Element>(args_, args_.values) &&
        (Math::kPack > 1 || args_.values.columns == s_.value_columns)) {
      values_ = in_place(args_.values, start);
    } else {
      auto* values = reinterpret_cast<Element*>(s_.values);
      stage_block(args_, job_, args_.values, start, seen, values, s_.value_columns);
      // A weight of 0 does not silence a NaN: what only some rows see must not reach the others.
      broken = take_out_broken(values, s_.value_columns, seen & ~by_all);
    }
#if defined(SPECDEC_TIER_AVX512BF16)
    if constexpr (Math::kPack == 2) {
      pack_pairs(values_, slots_, args_.values.columns, s_.packed, s_.value_columns);
      values_ = {s_.packed, s_.value_columns * 4};
    }
#endif
    for (int64_t set = 0; set < sets_; set += 2) {
      const bool both = set + 1 < sets_;
      if (!whole && !any_seen(set * kWidth, (set + 1 + both) * kWidth)) continue;
      both ? sets<2>(set, whole) : sets<1>(set, whole);
    }
    if constexpr (kWidth > 1) {  // sets of one lane leave no rest
      if (rest_ > 0 && (whole || any_seen(sets_ * kWidth, sets_ * kWidth + rest_))) rest(whole);
    }
    for (; broken != 0; broken &= broken - 1) add_broken(start, __builtin_ctzll(broken));
  }

  View in_place(const AttentionCache& cache, int64_t start) const {
    constexpr int64_t kSize = sizeof(Element);
    return {static_cast<const char*>(cache.data) + slot_start(args_, job_, cache, start) * kSize, cache.slot * kSize};
  }

  bool any_seen(int64_t from, int64_t to) const {
    uint64_t seen = 0;
    for (int64_t r = from; r < to; ++r) seen |= s_.seen[r];
    return seen != 0;
  }

  template <int Sets>
  void sets(int64_t first, bool whole) {
    constexpr int64_t kScores = kAttentionBlock * kWidth, kWeights = kScores / Math::kPack * 4;
    const char* query = s_.lane_query + first * key_words_ * kWidth * 4;
    multiply<Math, Sets, false>({keys_.data, keys_.stride, 4}, {query, key_words_ * kWidth * 4, kWidth * 4}, slots_,
                                key_words_, s_.scores, kWidth, kScores);
    if (scale_.limit != 0.0f)
      for (int i = 0; i < Sets; ++i) cap_scores(scale_, s_.scores + i * kScores, slots_ * kWidth);
    float* values = s_.lane_values + first * kWidth * s_.value_columns;
    char* weights = Math::kPack == 1 ? reinterpret_cast<char*>(s_.scores) : s_.weights;
    for (int i = 0; i < Sets; ++i) {
      const int64_t row = (first + i) * kWidth;
      int32_t low[kWidth], high[kWidth];
      for (int lane = 0; lane < kWidth && !whole; ++lane) {
        low[lane] = static_cast<int32_t>(s_.seen[row + lane]);
        high[lane] = static_cast<int32_t>(s_.seen[row + lane] >> 32);
      }
      soften_lanes<Math>(s_.scores + i * kScores, slots_, scale_.factor, whole ? nullptr : low, high, s_.most + row,
                         s_.sum + row, values + i * kWidth * s_.value_columns, s_.value_columns,
                         weights + i * kWeights);
    }
    multiply<Math, Sets, true>({values_.data, 4, values_.stride}, {weights, kWeights, kWidth * 4}, s_.value_columns,
                               slots_ / Math::kPack, values, kWidth, kWidth * s_.value_columns);
  }

  void rest(bool whole) {
    auto* weights = reinterpret_cast<Element*>(s_.weights);
    if constexpr (Math::kPack == 1) weights = reinterpret_cast<Element*>(s_.scores);
    constexpr int64_t kWeights = kAttentionBlock * static_cast<int64_t>(sizeof(Element));
    const char* query = s_.rest_query;
    float* scores = s_.scores;
    for (int64_t r = 0; r < rest_; r += 4, query += 4 * rest_stride(), scores += 4 * kAttentionBlock)
      with_rows(rest_ - r, [&](auto rows) {
        dot_rows<Math, decltype(rows)::kRows>(keys_.data, keys_.stride, slots_, query, rest_stride(),
                                              args_.keys.columns, scores);
      });
    if (scale_.limit != 0.0f) cap_scores(scale_, s_.scores, rest_ * kAttentionBlock);
    for (int64_t r = 0; r < rest_; ++r) {
      const int64_t row = sets_ * kWidth + r;
      soften_row<Math>(s_.scores + r * kAttentionBlock, slots_, scale_.factor, whole ? ~uint64_t{0} : s_.seen[row],
                       s_.most + row, s_.sum + row, s_.rest_values + r * s_.value_columns, s_.value_columns,
                       weights + r * kAttentionBlock);
    }
    for (int64_t r = 0; r < rest_; r += 4) {
      const Words spread = {reinterpret_cast<const char*>(weights + r * kAttentionBlock), kWeights, 4};
      float* values = s_.rest_values + r * s_.value_columns;
      with_rows(rest_ - r, [&](auto rows) {
        constexpr int kRows = decltype(rows)::kRows, kVectors = kWidth == 16 ? 4 : 2;
        int64_t d = 0;
        for (; d + kVectors * kWidth <= s_.value_columns; d += kVectors * kWidth)
          multiply_tile<Math, kRows, kVectors, true>(spread, {values_.data + d * 4, kWidth * 4, values_.stride},
                                                     slots_ / Math::kPack, values + d, s_.value_columns, kWidth);
        for (; d < s_.value_columns; d += kWidth)
          multiply_tile<Math, kRows, 1, true>(spread, {values_.data + d * 4, 0, values_.stride}, slots_ / Math::kPack,
                                              values + d, s_.value_columns, 0);
      });
    }
  }

  template <int Rows>
  struct RowCount {
    static constexpr int kRows = Rows;
  };
  template <typename F>
  SPECDEC_INLINE void with_rows(int64_t rows, F&& f) {
    if (rows == 1)
      f(RowCount<1>{});
    else if (rows == 2)
      f(RowCount<2>{});
    else
      f(RowCount<4>{});
  }

  // Adds what take_out_broken took from slot `i` of the block to the rows that see it.
  void add_broken(int64_t start, int i) {
    auto* slot = reinterpret_cast<float*>(s_.scores);
    stage_slot(start + i, slot);
    for (int64_t r = 0; r < job_.at.rows; ++r) {
      if ((s_.seen[r] >> i & 1) == 0) continue;
      const bool lane = r < sets_ * kWidth;
      float* to = lane ? s_.lane_values + r / kWidth * kWidth * s_.value_columns + r % kWidth
                       : s_.rest_values + (r - sets_ * kWidth) * s_.value_columns;
      for (int64_t d = 0; d < args_.values.columns; ++d)
        if (!(__builtin_fabsf(slot[d]) < kInf)) to[lane ? d * kWidth : d] += slot[d];
    }
  }

  void stage_slot(int64_t slot, float* to) {
    with_cache_type(args_.cache_type, [&](auto tag) {
      const auto from = static_cast<decltype(tag)>(args_.values.data) + slot_start(args_, job_, args_.values, slot);
      convert_row(from, args_.values.column, args_.values.columns, to, s_.value_columns);
    });
  }

  void write() {
    for (int64_t set = 0; set < sets_; ++set) {
      const float* values = s_.lane_values + set * kWidth * s_.value_columns;
      const int64_t rows = job_.at.rows - set * kWidth;
      float* to = job_.partial + set * kWidth * args_.partial_stride;
      for (int64_t d = 0; d < s_.value_columns; d += kWidth) {
        Vec tile[kWidth];
        for (int i = 0; i < kWidth; ++i) tile[i] = load(values + (d + i) * kWidth);
        transpose(tile);
        for (int i = 0; i < kWidth && i < rows; ++i) store(to + i * args_.partial_stride + d, tile[i]);
      }
    }
    for (int64_t r = 0; r < job_.at.rows; ++r) {
      float* to = job_.partial + r * args_.partial_stride;
      if (r >= sets_ * kWidth)
        __builtin_memcpy(to, s_.rest_values + (r - sets_ * kWidth) * s_.value_columns,
                         s_.value_columns * sizeof(float));
      to[s_.value_columns] = s_.most[r];
      to[s_.value_columns + 1] = s_.sum[r];
    }
  }

  const AttentionArgs& args_;
  const AttentionJob& job_;
  const Scratch s_;
  int64_t sets_, rest_, key_words_;
  float sign_;
  ScoreScale scale_;
  int64_t all_from_, all_to_, slots_;
  View keys_, values_;
};

// Two bytes a number where the tier multiplies pairs of bf16, and nothing is lost by it.
SPECDEC_INLINE bool takes_bf16(const AttentionArgs& args) {
#if defined(SPECDEC_TIER_AVX512BF16)
  return args.query_type == DType::kBf16 && args.cache_type != CacheType::kFloat && args.cache_type != CacheType::kHalf;
#else
  (void)args;
  return false;
#endif
}

int64_t scratch_bytes(const AttentionArgs& args) { return Scratch(args, nullptr).bytes; }

void attend(const AttentionArgs& args, const AttentionJob& job, void* scratch) {
#if defined(SPECDEC_TIER_AVX512BF16)
  if (takes_bf16(args)) return Job<Bf16Math>(args, job, scratch).run();
#endif
  Job<FloatMath>(args, job, scratch).run();
}

template <typename T>
void merge_row(const AttentionArgs& args, const AttentionMerge& merge, int64_t r, T* out) {
  const int64_t columns = args.values.columns, padded = round_up(columns, 16);
  const int64_t row = merge.at.first_row + r, head = merge.at.kv_head * args.group + row % args.group;
  const int64_t at = merge.at.nodes[row / args.group].node * args.query_heads + head;
  float most = kNothingSeen;
  const auto for_parts = [&](auto&& f) {
    for (int i = 0; i < 2; ++i)
      for (int64_t split = 0; split < merge.splits[i]; ++split)
        f(merge.parts[i] + split * merge.strides[i] + r * args.partial_stride);
  };
  for_parts([&](float* part) { most = part[padded] > most ? part[padded] : most; });
  const bool nothing = most == kNothingSeen;
  const bool sinks = args.sinks != nullptr;
  const double sink = sinks ? args.sinks[head] * kLog2E : 0.0;
  if (sinks && sink > most) most = static_cast<float>(-__builtin_floor(-sink));
  double total = sinks ? __builtin_exp2(sink - most) : 0.0;
  for_parts([&](float* part) {
    float factor[kWidth];
    store(factor, exp2(set1(part[padded] - most)));
    part[padded + 2] = factor[0];
    total += static_cast<double>(part[padded + 1]) * factor[0];
  });
  if (args.lse != nullptr)
    args.lse[at] =
        static_cast<float>(total == 0.0 ? -__builtin_inf() : (most + __builtin_log2(total)) * 0x1.62e42fefa39efp-1);
  float scale = static_cast<float>(1.0 / total);
  if (args.values.scale != nullptr) scale *= args.values.scale[merge.at.kv_head];
  if (nothing && total == total) scale = 0.0f;
  for (int64_t d = 0; d < columns; d += kWidth) {
    Vec value = set1(0.0f);
    for_parts([&](float* part) { value = fma(load(part + d), set1(part[padded + 2]), value); });
    const int n = static_cast<int>(columns - d < kWidth ? columns - d : kWidth);
    store(out + at * columns + d, mul(value, set1(scale)), n);
  }
}

void merge(const AttentionArgs& args, const AttentionMerge& merge) {
  const auto rows = [&](auto* out) {
    for (int64_t r = 0; r < merge.at.rows; ++r) merge_row(args, merge, r, out);
  };
  switch (args.query_type) {
    case DType::kFloat:
      return rows(static_cast<float*>(args.out));
    case DType::kBf16:
      return rows(static_cast<Bf16*>(args.out));
    case DType::kHalf:
      return rows(static_cast<Half*>(args.out));
  }
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {scratch_bytes, attend, merge};

}  // namespace specdec::SPECDEC_TIER
