#pragma once

#include <stdint.h>

#include "macros.h"

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), bit for bit what
// specdec_kernels/philox.py defines: the key is the seed, the counter (offset, stream, row, column / 4), the lane
// column % 4.

namespace specdec {

enum Stream : uint32_t { kAcceptStream = 0, kFinalStream = 1, kDraftStream = 2, kOrderStream = 3 };

struct PhiloxWords {
  uint32_t word[4];
};

SPECDEC_HD PhiloxWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// The word of one column. Offset, row and column / 4 wrap to 32 bits.
SPECDEC_HD uint32_t philox_word(uint64_t seed, uint64_t offset, Stream stream, uint32_t row, uint64_t column) {
  const PhiloxWords words =
      philox(seed, static_cast<uint32_t>(offset), stream, row, static_cast<uint32_t>(column >> 2));
  return words.word[column & 3];
}

/// A coin in [0, 1): 24 bits, exact in fp32.
SPECDEC_HD float coin(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

/// The v of a Gumbel -log(-log1p(-v)), in [2^-33, 1 - 2^-24]: all 32 bits, as a distance from 1. The 24 bits of a coin
/// end at a noise of 17 and never draw a token that shares a tail of 1e-3 with a vocabulary of 128256 (it needs 19).
SPECDEC_HD float gumbel_argument(uint32_t word) {
  const float v = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
  return v < 1.0f ? v : 0x1.fffffep-1f;
}

}  // namespace specdec
