// Quantised weights of the head: int8 and fp8 with a scale per row, int4 with a scale per group of columns.
//
// int8 and int4 meet a hidden vector in fixed point: 16 bits, absmax / 32767 to a unit. Rounding costs at most
// |w|_1 * absmax / 65534, hence |hidden| |w| sqrt(D) / 65534: below 1e-3 up to D = 4294, and where signs do not
// conspire far below at any D. All sums of products are exact, and what follows has one order of additions, so every
// tier gives the same bits. fp8 is widened to fp32 without loss and multiplied there.
#pragma once

#include "head.h"
#include "simd.h"

namespace specdec::SPECDEC_TIER {

int64_t packed_quantised_bytes(const HeadArgs& args);
void pack_quantised(const HeadArgs& args, const HeadRun& run);

// out[b * kHeadBlock + i] = row[i] . hidden vector b of the run, for int8 and fp8 before the row's scale. `row` are the
// rows of indices start..start + size among all that are looked at; `rows` names those, null: in order. Writes whole
// tiles of 8.
void multiply_quantised(const HeadArgs& args, const HeadRun& run, const int32_t* rows, int64_t start,
                        const int32_t* row, int size, float* out);

}  // namespace specdec::SPECDEC_TIER
