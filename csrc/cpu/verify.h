// Verification's wide work, block by block of the vocabulary: what one tier compiles. The scalar walks over it are in
// specdec/walkers.h, the choice of rows and the sums across blocks in verify_rows.h.
#pragma once

#include <stdint.h>

#include "dtypes.h"

namespace specdec {

// Columns are split into blocks whatever the number of threads, so sums round alike in every run.
constexpr int64_t kBlock = 4096;

// One row of logits where the model left it.
struct LogitRow {
  const void* logits;       // [columns], unit stride
  const int32_t* ids;       // [columns] ascending target ids of a trimmed vocabulary, null: column v is token v
  const uint32_t* allowed;  // bit mask over target ids, null: all are allowed
  int64_t columns;
  int64_t vocabulary;  // ids outside are no tokens
  DType type;
  const void* mixed = nullptr;  // a second row of the same type: a logit is (1 - mix) * logits + mix * mixed
  float mix = 0.0f;
  float cut = -__builtin_inff();      // logits below it count as -inf; NaN does not
  const int32_t* excluded = nullptr;  // ascending columns that count as -inf
  int64_t num_excluded = 0;
};

// Probability of a logit x: 2^((x - peak) * slope) * scale.
struct Softmax {
  float peak;   // the row's largest logit
  float slope;  // log2(e) / temperature
  float scale;  // 1 / sum, times the weight with which the row enters
};

struct BlockSum {
  float peak;  // the block's largest logit, the lowest float if none is finite
  float sum;   // of 2^((x - peak) * slope); NaN if one is NaN or +inf
};

struct Shares {
  double both;
  double capped;
};

struct VerifyKernels {
  // Over columns block * kBlock ... of a row.
  BlockSum (*block_sum)(const LogitRow& row, int64_t block, float slope);

  // The block's largest logit, -inf if none is finite, +inf if one is NaN or +inf.
  float (*block_peak)(const LogitRow& row, int64_t block);

  // The first column of the block that holds `logit` and is allowed, -1 if none does.
  int64_t (*find)(const LogitRow& row, int64_t block, float logit);

  // Of a block's probabilities, each 2^s at scale 1: the sum of s * 2^s.
  double (*log_sum)(const LogitRow& row, const Softmax& softmax, int64_t block);

  // Over target ids block * kBlock ...: sum of the weights p - min(q, most * p), where p's row spans the target
  // vocabulary and q's has ids or spans it too. `q` null: sum of p.
  double (*excess)(const LogitRow& p, const Softmax& P, const LogitRow* q, const Softmax& Q, float most, int64_t block);

  // The first id of the block up to which these weights sum to more than `mass`; the last of positive weight where
  // rounding leaves none, -1 if there is no such id.
  int64_t (*draw)(const LogitRow& p, const Softmax& P, const LogitRow* q, const Softmax& Q, float most, int64_t block,
                  double mass);

  // Sums of min(p, q) and of those p that are the smaller.
  Shares (*overlap)(const LogitRow& p, const Softmax& P, const LogitRow& q, const Softmax& Q, int64_t block);
};

}  // namespace specdec
