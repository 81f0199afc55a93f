// What the search for a filter's cut asks of a row of logits, block by block: how much lies above two bounds, and the
// logits between them. What one tier compiles; the search itself is in cut.h.
#pragma once

#include <stdint.h>

#include "verify.h"

namespace specdec {

// Of a logit x with low <= x < high it is said that it is inside.
struct Bracket {
  float low, high;  // low > -inf
};

// A logit x weighs e^z, z = (x - peak) / temperature with both operations in IEEE fp32.
struct Scale {
  float peak, temperature;
};

// A block's columns beside a bracket. The first logits inside are stored, as many as there was room for.
struct Split {
  double total = 0.0;      // weight of all columns
  double from_low = 0.0;   // of those of x >= low
  double from_high = 0.0;  // of those of x >= high
  int64_t inside = 0;      // how many
  int64_t stored = 0;      // of these
};

constexpr int kClusterSize = 4;

// What tail() returns is within this much of the sum of the weights, relatively: log2(e) / temperature is rounded
// twice, its product with x - peak once, and so is the z that it stands for. That moves e^z by less than 2.4e-7 |z|,
// its computation by 1.5e-7, and logits of z < -30 weigh nothing beside the peak. It holds for temperatures within
// limits.
constexpr double kTailError = 0x1p-17;
constexpr float kTailColdest = 0x1p-60f, kTailHottest = 0x1p60f;

struct SelectKernels {
  // The first kClusterSize logits of every `stride` columns (a multiple of 32), -inf past the row's end. Returns how
  // many; `out` has room for 16 more.
  int64_t (*sample)(const LogitRow& row, int64_t stride, float* out);

  // Stores logits inside in out[0 ... room).
  using Pass = Split (*)(const LogitRow& row, int64_t block, const Bracket& bracket, const Scale& scale, float* out,
                         int64_t room);
  Pass count;  // every column weighs 1, whatever the scale
  Pass weigh;  // weights in fp64
  Pass tail;   // faster: `total` is the weight of x < low alone, to within kTailError; the other weights stay 0
};

}  // namespace specdec
