// What a thread needs for one job. For tier files only.
#pragma once

#include "attention.h"
#include "simd.h"

namespace specdec::SPECDEC_TIER {

constexpr int64_t kMostRest = kWidth - kWidth / 4;  // a rest of more rows than this fills a set

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

}  // namespace specdec::SPECDEC_TIER
