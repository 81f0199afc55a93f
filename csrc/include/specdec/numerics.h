#pragma once

#include "macros.h"

// Scalar arithmetic that every backend must round alike. A device compiler would contract a product and a sum into one
// rounding; its intrinsics do not. Host files are compiled with -ffp-contract=off.

namespace specdec {

SPECDEC_HD float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

SPECDEC_HD float rounded_difference(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

/// The acceptance rule. Strict, so that a coin of 0 never accepts a token of probability 0.
SPECDEC_HD bool accepts(float u, float q, float p) { return rounded_product(u, q) < p; }

}  // namespace specdec
