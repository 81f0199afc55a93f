// One job: blocks of slots, each scored, softened and multiplied with its values while it is in the cache.
#include "attention.h"

#include "attention_few.h"
#include "attention_job.h"
#include "attention_merge.h"

namespace specdec::SPECDEC_TIER {
namespace {

template <typename Math>
class Job : JobRows<Math> {
  using Rows = JobRows<Math>;
  using Rows::args_, Rows::job_, Rows::s_, Rows::sets_, Rows::rest_, Rows::key_words_, Rows::scale_;
  using Rows::node_of, Rows::rest_stride, Rows::start, Rows::write;
  using typename Rows::Element;
  static constexpr int64_t kSize = sizeof(Element);

 public:
  Job(const AttentionArgs& args, const AttentionJob& job, void* scratch) : JobRows<Math>(args, job, scratch) {}

  void run() {
    start();
    find_limits();
    for (int64_t start = job_.first_slot / kAttentionBlock * kAttentionBlock; start < job_.last_slot;
         start += kAttentionBlock)
      block(start);
    write();
  }

 private:
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
    values_ = {s_.values, s_.value_columns * kSize};
    if (whole && lies_ready<Element>(args_, args_.keys) && args_.keys.columns % Math::kPack == 0)
      keys_ = in_place(job_, args_.keys, start);
    else
      stage_block(args_, job_, args_.keys, start, slots_, seen, reinterpret_cast<Element*>(s_.keys), s_.key_columns);
    if (whole && lies_ready<Element>(args_, args_.values) &&
        (Math::kPack > 1 || args_.values.columns == s_.value_columns)) {
      values_ = in_place(job_, args_.values, start);
    } else {
      auto* values = reinterpret_cast<Element*>(s_.values);
      stage_block(args_, job_, args_.values, start, slots_, seen, values, s_.value_columns);
      // A weight of 0 does not silence a NaN: what only some rows see must not reach the others.
      broken = take_out_broken(values, s_.value_columns, seen & ~by_all);
    }
    packed_ = false;
    find_next(start);
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

  View in_place(const AttentionJob& job, const AttentionCache& cache, int64_t start) const {
    return {static_cast<const char*>(cache.data) + slot_start(args_, job, cache, start) * kSize, cache.slot * kSize};
  }

  // Values as sets read them: in pairs of slots, which are made once in a block, after its first scores, by when the
  // rows have arrived from memory.
  __attribute__((noinline)) View set_values() {
#if defined(SPECDEC_TIER_AVX512BF16)
    if constexpr (Math::kPack > 1) {
      if (!packed_) pack_pairs(values_, slots_, args_.values.columns, s_.packed, s_.value_columns);
      packed_ = true;
      return {s_.packed, s_.value_columns * 4};
    }
#endif
    return values_;
  }

  // What is fetched during the block at `start`, if it is a whole one: the next whole one of this job, or else the
  // first of what the thread does next.
  void find_next(int64_t start) {
    next_keys_ = next_values_ = {};
    const AttentionJob* job = &job_;
    start += kAttentionBlock;
    if (start > job->last_slot || !lies_ready<Element>(args_, args_.keys)) return;
    if (start + kAttentionBlock > job->last_slot && job->following != nullptr) {
      job = job->following;
      start = round_up(job->first_slot, kAttentionBlock);
    }
    if (start + kAttentionBlock > job->last_slot) return;
    next_keys_ = Ahead(in_place(*job, args_.keys, start), args_.keys.columns * kSize);
    next_values_ = Ahead(in_place(*job, args_.values, start), args_.values.columns * kSize);
    start += kAttentionBlock;
    if (start + kAttentionBlock > job->last_slot) return;
    touch_pages(in_place(*job, args_.keys, start));
    touch_pages(in_place(*job, args_.values, start));
  }

  // A line of each page of a block, so that its translation is known when the rest is fetched.
  static void touch_pages(View rows) {
    constexpr int64_t kPage = 4096;
    const int64_t step = rows.stride < kPage ? kPage : rows.stride;
    for (int64_t byte = 0; byte < kAttentionBlock * rows.stride; byte += step)
      __builtin_prefetch(rows.data + byte, 0, 2);
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
    const Words keys = {keys_.data, keys_.stride, 4}, rows = {query, key_words_ * kWidth * 4, kWidth * 4};
    const bool fetches = first == 0 && next_keys_;
    constexpr int kRows = kTileSums / Sets;
    if (fetches)
      multiply<Math, Sets>(keys, rows, slots_, key_words_, s_.scores, kWidth, kScores, NewSums{},
                           FetchAhead<kRows>{next_keys_});
    else
      multiply<Math, Sets>(keys, rows, slots_, key_words_, s_.scores, kWidth, kScores, NewSums{}, FetchNothing{});
    if (scale_.limit != 0.0f)
      for (int i = 0; i < Sets; ++i) cap_scores(scale_, s_.scores + i * kScores, slots_ * kWidth);
    float* values = s_.lane_values + first * kWidth * s_.value_columns;
    char* weights = Math::kPack == 1 ? reinterpret_cast<char*>(s_.scores) : s_.weights;
    float shrink[Sets * kWidth];
    for (int i = 0; i < Sets; ++i) {
      const int64_t row = (first + i) * kWidth;
      int32_t low[kWidth], high[kWidth];
      for (int lane = 0; lane < kWidth && !whole; ++lane) {
        low[lane] = static_cast<int32_t>(s_.seen[row + lane]);
        high[lane] = static_cast<int32_t>(s_.seen[row + lane] >> 32);
      }
      soften_lanes<Math>(s_.scores + i * kScores, slots_, scale_.factor, whole ? nullptr : low, high, s_.most + row,
                         s_.sum + row, shrink + i * kWidth, weights + i * kWeights);
    }
    const View rows_of_values = set_values();
    const Words by = {weights, kWeights, kWidth * 4}, columns = {rows_of_values.data, 4, rows_of_values.stride};
    const int64_t steps = slots_ / Math::kPack;
    if (fetches)
      multiply<Math, Sets>(columns, by, s_.value_columns, steps, values, kWidth, kWidth * s_.value_columns,
                           JoinLanes{shrink}, FetchAhead<kRows>{next_values_});
    else
      multiply<Math, Sets>(columns, by, s_.value_columns, steps, values, kWidth, kWidth * s_.value_columns,
                           JoinLanes{shrink}, FetchNothing{});
  }

  void rest(bool whole) {
    auto* weights = reinterpret_cast<Element*>(s_.weights);
    if constexpr (Math::kPack == 1) weights = reinterpret_cast<Element*>(s_.scores);
    const char* query = s_.rest_query;
    Ahead none;
    float* scores = s_.scores;
    for (int64_t r = 0; r < rest_; r += 4, query += 4 * rest_stride(), scores += 4 * kAttentionBlock)
      with_rows(rest_ - r, [&](auto rows) {
        dot_rows<Math, decltype(rows)::kRows>(keys_, slots_, query, rest_stride(), args_.keys.columns, scores,
                                              sets_ == 0 && r == 0 ? next_keys_ : none);
      });
    if (scale_.limit != 0.0f) cap_scores(scale_, s_.scores, rest_ * kAttentionBlock);
    float shrink[kWidth];
    const int64_t first = sets_ * kWidth;
    soften_rows<Math>(rest_, s_.scores, slots_, scale_.factor, whole ? nullptr : s_.seen + first, s_.most + first,
                      s_.sum + first, shrink, weights);
    for (int64_t r = 0; r < rest_; r += 4)
      with_rows(rest_ - r, [&](auto rows) {
        add_rows<decltype(rows)::kRows>(weights + r * kAttentionBlock, shrink + r,
                                        s_.rest_values + r * s_.value_columns,
                                        sets_ == 0 && r == 0 ? next_values_ : none);
      });
  }

  // The values of a few rows.
  template <int Rows>
  void add_rows(const Element* weights, const float* shrink, float* values, Ahead& ahead) {
    constexpr int kVectors = kWidth == 16 ? 4 : 2, kLeast = Math::kPack;
    View rows = values_;
    for (int64_t d = 0, step; d < s_.value_columns; d += step, rows.data += step * kSize) {
      const int64_t left = args_.values.columns - d;
      const bool many = s_.value_columns - d >= kVectors * kWidth || (Math::kPack > 1 && left > kLeast * kWidth);
      const auto add = many ? add_columns<Math, Rows, kVectors> : add_columns<Math, Rows, kLeast>;
      add(weights, rows, slots_, Math::kPack > 1 ? left : s_.value_columns - d, shrink, values + d, s_.value_columns,
          ahead);
      step = (many ? kVectors : kLeast) * kWidth;
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
    auto* slot = reinterpret_cast<float*>(s_.values);  // no longer in use
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

  int64_t all_from_, all_to_, slots_;
  bool packed_;
  View keys_, values_;
  Ahead next_keys_, next_values_;
};

int64_t scratch_bytes(const AttentionArgs& args) { return Scratch(args, nullptr).bytes; }

void attend(const AttentionArgs& args, const AttentionJob& job, void* scratch) {
#if defined(SPECDEC_TIER_AVX512BF16)
  // Two bytes a number where nothing is lost by it.
  if (args.query_type == DType::kBf16 && args.cache_type != CacheType::kFloat && args.cache_type != CacheType::kHalf)
    return Job<Bf16Math>(args, job, scratch).run();
#endif
  Job<FloatMath>(args, job, scratch).run();
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {scratch_bytes, attend, merge};

}  // namespace specdec::SPECDEC_TIER
