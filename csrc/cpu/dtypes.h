// Storage types of logits, weights and hidden vectors. Plain data: every tier sees the same types, none brings code.
#pragma once

#include <stdint.h>

namespace specdec {

struct Bf16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

enum class DType : int32_t { kFloat, kBf16, kHalf };

}  // namespace specdec
