// The passes over a row that find a filter's cut, see select.h.
#include "select.h"

#include "row_chunks.h"
#include "simd_double.h"

namespace specdec::SPECDEC_TIER {

namespace {

// Where the logits inside a bracket go.
class Store {
 public:
  Store(float* out, int64_t room) : out_(out), room_(room) {}

  void put(Mask inside, Vec x) {
    this->inside += __builtin_popcount(bits(inside));
    if (stored + kWidth <= room_) stored += compress(out_ + stored, inside, x);
  }

  int64_t inside = 0, stored = 0;

 private:
  float* out_;
  const int64_t room_;
};

int64_t sample(const LogitRow& row, int64_t stride, float* out) {
  static_assert(kClusterSize % kWidth == 0 || kWidth % kClusterSize == 0, "clusters are stored by whole vectors");
  ChunkBuffer buffer;
  int64_t number = 0;
  with_logits(row, [&](auto tag) {
    for (int64_t column = 0; column < row.columns; column += stride) {
      const int size = static_cast<int>(least(kClusterSize, row.columns - column));
      each(chunk_at(row, column, size, tag, &buffer), [&](int i, Vec x) { store(out + number + i, x); });
      for (int i = size; i < kClusterSize; ++i) out[number + i] = -kInf;
      number += kClusterSize;
    }
  });
  return number;
}

Split count(const LogitRow& row, int64_t block, const Bracket& bracket, const Scale&, float* out, int64_t room) {
  const Vec low = set1(bracket.low), high = set1(bracket.high);
  Store inside(out, room);
  int64_t from_high = 0;
  each_chunk(row, block, [&](const auto& chunk) {
    each(chunk, [&](int, Vec x) {
      if (!any(ge(x, low))) return;
      from_high += __builtin_popcount(bits(ge(x, high)));
      inside.put(both(ge(x, low), gt(high, x)), x);
    });
  });
  const auto total = static_cast<double>(least(kBlock, row.columns - block * kBlock));
  const auto above = static_cast<double>(from_high), from_low = static_cast<double>(from_high + inside.inside);
  return {total, from_low, above, inside.inside, inside.stored};
}

Split weigh(const LogitRow& row, int64_t block, const Bracket& bracket, const Scale& scale, float* out, int64_t room) {
  const Vec low = set1(bracket.low), high = set1(bracket.high), zero = set1(0.0f), one = set1(1.0f);
  const Vec peak = set1(scale.peak), temperature = set1(scale.temperature);
  Store inside(out, room);
  // Of all, from `low` on, from `high` on.
  Doubles sums[3][kParts];
  for (auto& sum : sums)
    for (Doubles& lanes : sum) lanes = dset1(0.0);
  each_chunk(row, block, [&](const auto& chunk) {
    each(chunk, [&](int, Vec x) {
      const Vec z = div(sub(x, peak), temperature);
      Doubles weights[kParts];
      for (int i = 0; i < kParts; ++i) {
        weights[i] = exp(part(z, i));
        sums[0][i] = dadd(sums[0][i], weights[i]);
      }
      const Mask from_low = ge(x, low), from_high = ge(x, high);
      if (!any(from_low)) return;
      const Vec counted[] = {select(from_low, one, zero), select(from_high, one, zero)};
      for (int i = 0; i < kParts; ++i) {
        sums[1][i] = dfma(weights[i], part(counted[0], i), sums[1][i]);
        sums[2][i] = dfma(weights[i], part(counted[1], i), sums[2][i]);
      }
      inside.put(both(from_low, gt(high, x)), x);
    });
  });
  double totals[3];
  for (int k = 0; k < 3; ++k) {
    Doubles sum = sums[k][0];
    for (int i = 1; i < kParts; ++i) sum = dadd(sum, sums[k][i]);
    totals[k] = dreduce_add(sum);
  }
  return {totals[0], totals[1], totals[2], inside.inside, inside.stored};
}

Split tail(const LogitRow& row, int64_t block, const Bracket& bracket, const Scale& scale, float* out, int64_t room) {
  const Vec low = set1(bracket.low), high = set1(bracket.high), zero = set1(0.0f);
  const Vec peak = set1(scale.peak), slope = set1(1.44269504f / scale.temperature);
  Store inside(out, room);
  Doubles sum[kParts];
  for (Doubles& lanes : sum) lanes = dset1(0.0);
  each_chunk(row, block, [&](const auto& chunk) {
    each(chunk, [&](int, Vec x) {
      const Mask from_low = ge(x, low);
      const Vec weight = select(from_low, zero, exp2(mul(sub(x, peak), slope)));
      for (int i = 0; i < kParts; ++i) sum[i] = dadd(sum[i], part(weight, i));
      if (any(from_low)) inside.put(both(from_low, gt(high, x)), x);
    });
  });
  for (int i = 1; i < kParts; ++i) sum[0] = dadd(sum[0], sum[i]);
  return {dreduce_add(sum[0]), 0.0, 0.0, inside.inside, inside.stored};
}

}  // namespace

extern const SelectKernels select_kernels = {sample, count, weigh, tail};

}  // namespace specdec::SPECDEC_TIER
