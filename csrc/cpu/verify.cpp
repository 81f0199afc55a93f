// Verification's wide work: sums, peaks and draws over blocks of rows, see verify.h.
//
// Inside a block, logits are taken in chunks that stay in the nearest cache: a chunk is read once for its peak and
// again for its exponentials, and where a trimmed q is subtracted, it is subtracted in a chunk of p, never in a row of
// V.
#include "row_chunks.h"

namespace specdec::SPECDEC_TIER {

namespace {

constexpr float kLowest = -3.402823466e38f;

// Peaks are kept lane by lane and finite from below, so that no lane ever subtracts -inf from -inf.
BlockSum block_sum(const LogitRow& row, int64_t block, float slope) {
  Vec peak = set1(kLowest), sum = set1(0.0f);
  const Vec k = set1(slope);
  each_chunk(row, block, [&](const auto& chunk) {
    Vec higher = peak;
    each(chunk, [&](int, Vec x) { higher = max(x, higher); });
    sum = mul(sum, exp2(mul(sub(peak, higher), k)));
    peak = higher;
    each(chunk, [&](int, Vec x) { sum = add(sum, exp2(mul(sub(x, higher), k))); });
  });
  const float top = reduce_max(peak);
  return {top, reduce_add(mul(sum, exp2(mul(sub(peak, set1(top)), k))))};
}

float block_peak(const LogitRow& row, int64_t block) {
  Vec peak = set1(-kInf);
  Mask broken = first(0);
  each_chunk(row, block, [&](const auto& chunk) {
    each(chunk, [&](int, Vec x) {
      broken = either(broken, not_lt(x, set1(kInf)));
      peak = max(x, peak);
    });
  });
  return any(broken) ? kInf : reduce_max(peak);
}

int64_t find(const LogitRow& row, int64_t block, float logit) {
  int64_t found = -1;
  each_chunk(row, block, [&](const auto& chunk) {
    each(chunk, [&](int i, Vec x) {
      const uint32_t hits = bits(eq(x, set1(logit)));
      if (hits != 0 && found < 0) found = chunk.column + i + __builtin_ctz(hits);
    });
  });
  return found;
}

double log_sum(const LogitRow& row, const Softmax& softmax, int64_t block) {
  const Vec peak = set1(softmax.peak), slope = set1(softmax.slope);
  double total = 0.0;
  each_chunk(row, block, [&](const auto& chunk) {
    Vec sum = set1(0.0f);
    each(chunk, [&](int, Vec x) {
      // Below -200 the power is 0 already; -inf would make the product NaN.
      const Vec s = max(mul(sub(x, peak), slope), set1(-200.0f));
      sum = add(sum, mul(s, exp2(s)));
    });
    total += reduce_add(sum);
  });
  return total;
}

// p and q chunk after chunk of a block of the target's vocabulary.
class Pair {
 public:
  Pair(const LogitRow& p, const Softmax& P, const LogitRow* q, const Softmax& Q, int64_t block)
      : p_(p), q_(q), P_(P), Q_(Q), next_(block * kBlock), end_(least((block + 1) * kBlock, p.columns)) {
    if (q != nullptr && q->ids != nullptr) cursor_ = lower_bound(q->ids, q->columns, next_);
  }

  // Whether there was another chunk. Its `count` pairs are p[i], q[i]; the id of a pair is first + i, and where q is
  // trimmed and `ids` are given, only ids[i] have a q. A vector's lanes past the end hold p = 0 and q = 0.
  bool advance() {
    if (next_ >= end_) return false;
    first = next_;
    size = static_cast<int>(least(kChunk, end_ - first));
    next_ += size;
    probabilities(p_, P_, first, size, p);
    count = 0;
    if (q_ == nullptr) return true;
    int64_t from = first;
    count = size;
    if (q_->ids != nullptr) {
      // Ids are distinct, so at most as many columns belong to a chunk as it has ids; bounds hold for unsorted ids too.
      ids = q_->ids + (from = cursor_);
      count = static_cast<int>(lower_bound(ids, least(size, q_->columns - from), first + size));
      cursor_ += count;
    }
    probabilities(*q_, Q_, from, count, q);
    return true;
  }

  // body(place in p, q) for each pair of a trimmed q.
  template <typename Body>
  inline void each_trimmed(Body body) const {
    for (int i = 0; i < count; ++i) {
      const int64_t at = ids[i] - first;
      if (at >= 0 && at < size) body(at, q[i]);
    }
  }

  int64_t first = 0;
  int size = 0, count = 0;
  const int32_t* ids = nullptr;
  alignas(64) float p[kChunk];
  alignas(64) float q[kChunk];

 private:
  const LogitRow& p_;
  const LogitRow* q_;
  const Softmax P_, Q_;
  int64_t next_, end_, cursor_ = 0;
};

SPECDEC_INLINE float less(float a, float b) { return a < b ? a : b; }

// Turns a chunk's p into the weights p - min(q, most * p) and returns their sum.
SPECDEC_INLINE float weigh(Pair& pair, float most) {
  if (pair.ids != nullptr) {
    pair.each_trimmed([&](int64_t at, float q) { pair.p[at] -= less(q, most * pair.p[at]); });
  } else {
    const Vec limit = set1(most);
    for (int i = 0; i < pair.count; i += kWidth) {
      const Vec p = load(pair.p + i);
      store(pair.p + i, sub(p, min(load(pair.q + i), mul(limit, p))));
    }
  }
  Vec total = set1(0.0f);
  for (int i = 0; i < pair.size; i += kWidth) {
    const Vec rest = max(load(pair.p + i), set1(0.0f));
    store(pair.p + i, rest);
    total = add(total, rest);
  }
  return reduce_add(total);
}

double excess(const LogitRow& p, const Softmax& P, const LogitRow* q, const Softmax& Q, float most, int64_t block) {
  Pair pair(p, P, q, Q, block);
  double total = 0.0;
  while (pair.advance()) total += weigh(pair, most);
  return total;
}

int64_t draw(const LogitRow& p, const Softmax& P, const LogitRow* q, const Softmax& Q, float most, int64_t block,
             double mass) {
  Pair pair(p, P, q, Q, block);
  int64_t last = -1;
  double before = 0.0;
  while (pair.advance()) {
    const float sum = weigh(pair, most);
    if (sum <= 0.0f) continue;
    const bool here = before + sum > mass;
    double reached = before;
    for (int i = 0; i < pair.size; ++i) {
      if (pair.p[i] <= 0.0f) continue;
      reached += pair.p[i];
      last = pair.first + i;
      if (here && reached > mass) return last;
    }
    if (here) return last;
    before += sum;
  }
  return last;
}

Shares overlap(const LogitRow& p, const Softmax& P, const LogitRow& q, const Softmax& Q, int64_t block) {
  Pair pair(p, P, &q, Q, block);
  Shares found = {0.0, 0.0};
  while (pair.advance()) {
    if (pair.ids != nullptr) {
      pair.each_trimmed([&](int64_t at, float chance) {
        found.both += less(pair.p[at], chance);
        if (pair.p[at] < chance) found.capped += pair.p[at];
      });
      continue;
    }
    const Vec zero = set1(0.0f);
    Vec both = zero, capped = zero;
    for (int i = 0; i < pair.count; i += kWidth) {
      const Vec a = load(pair.p + i), b = load(pair.q + i);
      both = add(both, min(a, b));
      capped = add(capped, select(gt(b, a), a, zero));
    }
    found.both += reduce_add(both);
    found.capped += reduce_add(capped);
  }
  return found;
}

}  // namespace

extern const VerifyKernels verify_kernels = {block_sum, block_peak, find, log_sum, excess, draw, overlap};

}  // namespace specdec::SPECDEC_TIER
