// The drafter's head: logits of some rows of a weight, their log-sum-exp and entropy, and the k best or drawn tokens.
#pragma once

#include <stdint.h>

#include "dtypes.h"

namespace specdec {

constexpr int64_t kHeadBlock = 256;  // rows whose statistics are one partial result
constexpr int kHeadMostK = 64;

// Of one request and one block of rows: the largest logit, and sums of e^d and d e^d over d = (logit - max) /
// temperature. A block of nothing but -inf has sum 0; one with NaN or +inf has sum NaN.
struct HeadSums {
  float max, sum, weighted;
};

// A list is kept in descending order of (key, -id). Where nothing is drawn the key is the logit.
struct HeadCandidate {
  double key;  // near temperature 0 an fp32 quotient would be too coarse for the noise that is added to it
  float logit;
  int32_t id;
};

struct HeadArgs {
  DType dtype;         // of hidden and weight
  int64_t batch, dim;  // B, D
  const void* hidden;  // [B, D], any strides
  int64_t hidden_strides[2];
  const void* weight;  // [height, D], rows contiguous
  int64_t height, weight_stride;
  int64_t count;             // R, rows to look at
  const int32_t* rows;       // [R] or [B, R]; null: all rows in order
  int64_t rows_stride;       // 0 where requests share rows
  const int32_t* token_ids;  // [height] or null
  const void* bias;          // [height] or null
  DType bias_dtype;
  const float* scale;  // [height] or null
  float temperature;
  const float* temperatures;  // [B] or null
  int k;
  const int64_t* seed;    // [B]; null: nothing is drawn
  const int64_t* offset;  // [B]
  const int32_t* row;     // [B] or null

  float* logits;      // [B, k]
  int32_t* tokens;    // [B, k]
  float* lse;         // [B]
  float* entropy;     // [B]
  float* all_logits;  // [B, R] or null

  // Scratch. A task is what one thread does: any blocks, in any order. Sums are kept for each block and the order of
  // candidates is total, so no result depends on who did what.
  int64_t blocks, tasks;
  void* packed;               // packed_bytes(args)
  HeadSums* sums;             // [B, blocks]
  HeadCandidate* candidates;  // [tasks, B, k]
  int32_t* found;             // [tasks, B]
  float* buffer;              // [tasks, kHeadGroup, kHeadBlock]
};

constexpr int64_t kHeadGroup = 16;  // hidden vectors that meet a block of rows while it is in the cache

struct HeadKernels {
  int64_t (*packed_bytes)(const HeadArgs& args);
  void (*pack)(const HeadArgs& args);  // hidden, as the tier's dot product reads it
  void (*scan)(const HeadArgs& args, int64_t task, int64_t first_block, int64_t last_block);
  void (*finish)(const HeadArgs& args, int64_t b);  // merge what the tasks found for one request
};

}  // namespace specdec
