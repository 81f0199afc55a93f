// The drafter's head: logits of some rows of a weight, their log-sum-exp and entropy, and the k best or drawn tokens.
#pragma once

#include <stdint.h>

#include "dtypes.h"

namespace specdec {

constexpr int64_t kHeadBlock = 240;  // rows whose statistics are one partial result; whole tiles of 4, 6 and 8 rows
constexpr int64_t kHeadRun = 64;     // hidden vectors that meet a block of rows while it is in the cache
constexpr int kHeadMostK = 64;

// Over t = logit * log2(e) / temperature: an integer anchor, the largest t rounded down, and sums of 2^(t - anchor) and
// of 2^(t - anchor) * (t - anchor). A term does not depend on the block it is in, and moving to another anchor is
// exact, so sums of any blocks of any shards agree up to the rounding of fp64. Nothing finite: anchor -inf, sums 0. A
// NaN or +inf among the logits: all NaN.
struct HeadSums {
  double anchor, sum, weighted;
};

// A list is kept in descending order of (key, -id). Where nothing is drawn the key is the logit.
struct HeadCandidate {
  double key;  // near temperature 0 an fp32 quotient would be too coarse for the noise that is added to it
  float logit;
  int32_t id;
};

// Neighbours in the batch that look at the same rows, at most kHeadRun.
struct HeadRun {
  int64_t first, size;
  int64_t line;  // of rows; negative: one that does not exist, and every logit is -inf
};

// How a weight is kept: in hidden's dtype; as int8 or fp8 e4m3 with a scale per row; as int4, columns in groups of
// kHeadColumns that share a scale: byte j of a group holds column j in its low four bits, j + 64 in the others, plus 8.
enum class HeadWeight : int32_t { kPlain, kInt8, kFp8, kInt4 };
constexpr int64_t kHeadColumns = 128;

struct HeadArgs {
  DType dtype;         // of hidden, and of a plain weight
  int64_t batch, dim;  // B, D
  const void* hidden;  // [B, D], any strides
  int64_t hidden_strides[2];
  HeadWeight kind;
  const void* weight;  // [height, D] (int4: bytes of whole groups), rows contiguous
  int64_t height, weight_stride;
  int64_t count;             // R, rows to look at
  const int32_t* rows;       // [lines, R]; null: all rows in order
  bool shared_rows;          // one line for all requests
  const int32_t* token_ids;  // [height] or null
  const void* bias;          // [height] or null
  DType bias_dtype;
  const float* scale;        // [height] or null
  const float* group_scale;  // [height, groups] of int4
  float temperature;
  const float* temperatures;  // [B] or null
  int k;
  const int64_t* seed;    // [B]; null: nothing is drawn
  const int64_t* offset;  // [B]
  const int32_t* row;     // [B] or null

  float* logits;      // [B, k]
  int32_t* tokens;    // [B, k]
  float* lse;         // [B] or null
  float* entropy;     // [B] or null
  float* all_logits;  // [B, R] or null
  double* keys;       // [B, k] or null
  HeadSums* parts;    // [B] or null

  // Scratch. A task is what one thread does: any items, in any order. An item is one block of one run. Sums are kept
  // for each block and the order of candidates is total, so no result depends on who did what.
  const HeadRun* runs;
  int64_t run_count, blocks, tasks;
  void* packed;               // packed_bytes(args)
  HeadSums* sums;             // [B, blocks]
  HeadCandidate* candidates;  // [tasks, B, k]
  int32_t* found;             // [tasks, B]
  float* buffer;              // [tasks, kHeadRun, kHeadBlock]
};

struct HeadKernels {
  int64_t (*packed_bytes)(const HeadArgs& args);
  void (*pack)(const HeadArgs& args, const HeadRun& run);  // its hidden vectors, as the tier's dot product reads them
  void (*scan)(const HeadArgs& args, int64_t task, int64_t first_item, int64_t last_item);
  void (*finish)(const HeadArgs& args, int64_t b);  // merge what the tasks found for one request
};

}  // namespace specdec
