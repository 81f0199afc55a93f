// The rows of a job: how their queries are packed, what has become of them so far, and what is left in the end. For
// tier files only.
#pragma once

#include "attention_scratch.h"
#include "attention_seen.h"
#include "attention_softmax.h"
#include "attention_stage.h"

namespace specdec::SPECDEC_TIER {

// Most rows go in sets of kWidth, one row in each lane: scores are [slot][lane] and values [column][lane], so that keys
// and values are read where they lie, a word at a time, and the softmax never crosses lanes. A rest of few rows would
// leave most lanes empty; it is done row by row, with slots and columns in the lanes.
template <typename Math>
class JobRows {
 protected:
  using Element = typename Math::Element;

  JobRows(const AttentionArgs& args, const AttentionJob& job, void* base)
      : args_(args), job_(job), s_(args, static_cast<char*>(base)) {
    const int64_t rest = job.at.rows % kWidth;
    rest_ = rest > kMostRest ? 0 : rest;
    sets_ = (job.at.rows - rest_ + kWidth - 1) / kWidth;
    key_words_ = round_up(args.keys.columns, Math::kPack) / Math::kPack;
    double factor = args.scale;
    if (args.keys.scale != nullptr) factor *= args.keys.scale[job.at.kv_head];
    negative_ = factor < 0.0;
    // Scores that are all equal still need a factor under which -inf stays what it is.
    factor = __builtin_fabs(factor) < 0x1p-120 ? 0x1p-120 : __builtin_fabs(factor);
    scale_ = {static_cast<float>(factor * kLog2E), 0.0f, 0.0f};
    if (args.softcap != 0.0)
      scale_ = {1.0f, static_cast<float>(factor / args.softcap), static_cast<float>(args.softcap * kLog2E)};
  }

  void start() {
    pack_query();
    for (int64_t r = 0; r < sets_ * kWidth + rest_; ++r) {
      s_.most[r] = kNothingSeen;
      s_.sum[r] = 0.0f;
    }
    zero(s_.lane_values, sets_ * kWidth * s_.value_columns);
    zero(s_.rest_values, round_up(rest_, 4) * s_.value_columns);
  }

  const AttentionNode& node_of(int64_t r) const {
    const int64_t row = r < job_.at.rows ? r : job_.at.rows - 1;
    return job_.at.nodes[(job_.at.first_row + row) / args_.group];
  }

  int64_t rest_stride() const { return s_.key_columns * static_cast<int64_t>(sizeof(Element)); }

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
  bool negative_;
  ScoreScale scale_;

 private:
  static void zero(float* p, int64_t count) { __builtin_memset(p, 0, count * sizeof(float)); }

  // Rows of the query as words: of a set [word][lane], of the rest [row][word].
  void pack_query() {
    for (int64_t set = 0; set < sets_; ++set) {
      auto* rows = reinterpret_cast<Element*>(s_.keys);  // not in use yet
      for (int64_t i = 0; i < kWidth; ++i) query_row(set * kWidth + i, rows + i * s_.key_columns);
      auto* to = reinterpret_cast<float*>(s_.lane_query) + set * key_words_ * kWidth;
      for (int64_t w = 0; w < key_words_; w += kWidth) {
        Vec tile[kWidth];
        for (int i = 0; i < kWidth; ++i) tile[i] = load(reinterpret_cast<float*>(rows + i * s_.key_columns) + w);
        transpose(tile);
        for (int i = 0; i < kWidth && w + i < key_words_; ++i) store(to + (w + i) * kWidth, tile[i]);
      }
    }
    auto* rest = reinterpret_cast<Element*>(s_.rest_query);
    // They are multiplied four at a time.
    for (int64_t r = 0; r < round_up(rest_, 4); ++r) query_row(sets_ * kWidth + r, rest + r * s_.key_columns);
  }

  // One row, padded with zeros; nothing but zeros behind the last.
  void query_row(int64_t r, Element* to) {
    const int64_t columns = r < job_.at.rows ? args_.keys.columns : 0, row = job_.at.first_row + r;
    const int64_t head = job_.at.kv_head * args_.group + row % args_.group;
    with_dtype(args_.query_type, [&](auto tag) {
      const auto* from =
          static_cast<decltype(tag)>(args_.query) + node_of(r).node * args_.query_node + head * args_.query_head;
      convert_row(from, 1, columns, to, s_.key_columns);
    });
    for (int64_t d = 0; d < columns && negative_; d += kWidth) put(to + d, sub(set1(0.0f), load(to + d)));
  }
};

}  // namespace specdec::SPECDEC_TIER
