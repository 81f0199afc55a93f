// Verification's wide work: sums, peaks and draws over blocks of rows, see verify.h.
//
// Inside a block, logits are taken in chunks that stay in the nearest cache: a chunk is read once for its peak and
// again for its exponentials, and where a trimmed q is subtracted, it is subtracted in a chunk of p, never in a row of
// V.
#include "verify.h"

#include "simd.h"

namespace specdec::SPECDEC_TIER {

namespace {

constexpr int kChunk = 512;
constexpr int kWords = kChunk / 32;
constexpr float kLowest = -3.402823466e38f;
static_assert(kBlock % kChunk == 0 && kChunk % 32 == 0, "masks are read by whole words");

SPECDEC_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// 2^x for x <= 0 to 1.5e-7, 0 below -150, NaN stays NaN.
SPECDEC_INLINE Vec exp2(Vec x) {
  x = max(set1(-200.0f), x);
  const Vec n = round(x), f = sub(x, n);
  Vec p = set1(0x1.5bba0ep-10f);
  p = fma(p, f, set1(0x1.3cea88p-7f));
  p = fma(p, f, set1(0x1.c6b752p-5f));
  p = fma(p, f, set1(0x1.ebf9bcp-3f));
  p = fma(p, f, set1(0x1.62e42ap-1f));
  p = fma(p, f, set1(1.0f));
  return scale_by_power(p, n);
}

// Lane i is true iff bit i is set.
SPECDEC_INLINE Mask lanes(uint32_t word) {
  alignas(64) static const int32_t kBits[16] = {1,      2,      4,       8,       1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                                1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const Ints bits = iload(kBits);
  return ieq(iand(iset1(word), bits), bits);
}

// body(i, x) for each vector of `n` logits, -inf where a column is not there or not allowed.
template <typename T, typename Body>
SPECDEC_INLINE void each(const T* logits, const uint32_t* allowed, int n, Body body) {
  int i = 0;
  if (allowed == nullptr) {
    for (; i + kWidth <= n; i += kWidth) body(i, load(logits + i));
    if (i < n) body(i, load(logits + i, n - i, -kInf));
    return;
  }
  for (; i < n; i += kWidth) {
    const Vec x = i + kWidth <= n ? load(logits + i) : load(logits + i, n - i, -kInf);
    body(i, select(lanes(allowed[i >> 5] >> (i & 31)), x, set1(-kInf)));
  }
}

// The mask of `n` columns from `column` on, by column; null if all are allowed. A trimmed row's bits are gathered into
// `gathered`.
SPECDEC_INLINE const uint32_t* allowed_columns(const LogitRow& row, int64_t column, int n, uint32_t* gathered) {
  if (row.allowed == nullptr) return nullptr;
  if (row.ids == nullptr) return row.allowed + column / 32;
  for (int w = 0; w < kWords; ++w) gathered[w] = 0;
  for (int i = 0; i < n; ++i) {
    const int32_t id = row.ids[column + i];
    if (id < 0 || id >= row.vocabulary) continue;
    gathered[i >> 5] |= ((row.allowed[id >> 5] >> (id & 31)) & 1u) << (i & 31);
  }
  return gathered;
}

// body(logits, allowed, column, n) for each chunk of a block of a row's columns.
template <typename T, typename Body>
SPECDEC_INLINE void each_chunk(const LogitRow& row, int64_t block, const T*, Body body) {
  uint32_t gathered[kWords];
  const int64_t end = least((block + 1) * kBlock, row.columns);
  for (int64_t column = block * kBlock; column < end; column += kChunk) {
    const int n = static_cast<int>(least(kChunk, end - column));
    body(static_cast<const T*>(row.logits) + column, allowed_columns(row, column, n, gathered), column, n);
  }
}

// Peaks are kept lane by lane and finite from below, so that no lane ever subtracts -inf from -inf.
BlockSum block_sum(const LogitRow& row, int64_t block, float slope) {
  Vec peak = set1(kLowest), sum = set1(0.0f);
  const Vec k = set1(slope);
  with_dtype(row.type, [&](auto tag) {
    each_chunk(row, block, tag, [&](auto logits, const uint32_t* allowed, int64_t, int n) {
      Vec higher = peak;
      each(logits, allowed, n, [&](int, Vec x) { higher = max(x, higher); });
      sum = mul(sum, exp2(mul(sub(peak, higher), k)));
      peak = higher;
      each(logits, allowed, n, [&](int, Vec x) { sum = add(sum, exp2(mul(sub(x, higher), k))); });
    });
  });
  const float top = reduce_max(peak);
  return {top, reduce_add(mul(sum, exp2(mul(sub(peak, set1(top)), k))))};
}

float block_peak(const LogitRow& row, int64_t block) {
  Vec peak = set1(-kInf);
  Mask broken = first(0);
  with_dtype(row.type, [&](auto tag) {
    each_chunk(row, block, tag, [&](auto logits, const uint32_t* allowed, int64_t, int n) {
      each(logits, allowed, n, [&](int, Vec x) {
        broken = either(broken, not_lt(x, set1(kInf)));
        peak = max(x, peak);
      });
    });
  });
  return any(broken) ? kInf : reduce_max(peak);
}

int64_t find(const LogitRow& row, int64_t block, float logit) {
  int64_t found = -1;
  with_dtype(row.type, [&](auto tag) {
    each_chunk(row, block, tag, [&](auto logits, const uint32_t* allowed, int64_t column, int n) {
      each(logits, allowed, n, [&](int i, Vec x) {
        const uint32_t hits = bits(eq(x, set1(logit)));
        if (hits != 0 && found < 0) found = column + i + __builtin_ctz(hits);
      });
    });
  });
  return found;
}

// Probabilities of `n` columns from `column` on; up to a whole vector is written past the last.
void probabilities(const LogitRow& row, const Softmax& softmax, int64_t column, int n, float* out) {
  uint32_t gathered[kWords];
  const uint32_t* allowed = allowed_columns(row, column, n, gathered);
  const Vec peak = set1(softmax.peak), slope = set1(softmax.slope), scale = set1(softmax.scale);
  with_dtype(row.type, [&](auto tag) {
    each(static_cast<decltype(tag)>(row.logits) + column, allowed, n,
         [&](int i, Vec x) { store(out + i, mul(exp2(mul(sub(x, peak), slope)), scale)); });
  });
}

// The first of `count` ascending ids that is not below `id`.
int64_t lower_bound(const int32_t* ids, int64_t count, int64_t id) {
  const int32_t* at = ids;
  while (count > 0) {
    const int64_t half = count / 2;
    const bool below = at[half] < id;
    at = below ? at + half + 1 : at;
    count = below ? count - half - 1 : half;
  }
  return at - ids;
}

// (p - q)+ chunk after chunk of a block.
class Excess {
 public:
  Excess(const LogitRow& p, const Softmax& P, const LogitRow* q, const Softmax& Q, int64_t block)
      : p_(p), q_(q), P_(P), Q_(Q), next_(block * kBlock), end_(least((block + 1) * kBlock, p.columns)) {
    if (q != nullptr && q->ids != nullptr) cursor_ = lower_bound(q->ids, q->columns, next_);
  }

  // Whether there was another chunk; `value`, `first`, `size` and `sum` then describe it.
  bool advance() {
    if (next_ >= end_) return false;
    first = next_;
    size = static_cast<int>(least(kChunk, end_ - first));
    next_ += size;
    probabilities(p_, P_, first, size, value);
    if (q_ != nullptr) q_->ids != nullptr ? subtract_trimmed() : subtract();
    Vec total = set1(0.0f);
    for (int i = 0; i < size; i += kWidth) {
      // Trimmed or not, a vector's lanes past the end hold p = 0 and q = 0.
      const Vec rest = max(load(value + i), set1(0.0f));
      store(value + i, rest);
      total = add(total, rest);
    }
    sum = reduce_add(total);
    return true;
  }

  int64_t first = 0;
  int size = 0;
  float sum = 0.0f;
  alignas(64) float value[kChunk];

 private:
  void subtract() {
    probabilities(*q_, Q_, first, size, drafted_);
    for (int i = 0; i < size; i += kWidth) store(value + i, sub(load(value + i), load(drafted_ + i)));
  }

  // Ids are distinct, so at most as many columns belong to a chunk as it has ids. Bounds hold for unsorted ids too.
  void subtract_trimmed() {
    const int32_t* ids = q_->ids + cursor_;
    const int count = static_cast<int>(lower_bound(ids, least(size, q_->columns - cursor_), first + size));
    probabilities(*q_, Q_, cursor_, count, drafted_);
    for (int i = 0; i < count; ++i) {
      const int64_t at = ids[i] - first;
      if (at >= 0 && at < size) value[at] -= drafted_[i];
    }
    cursor_ += count;
  }

  const LogitRow& p_;
  const LogitRow* q_;
  const Softmax P_, Q_;
  int64_t next_, end_, cursor_ = 0;
  alignas(64) float drafted_[kChunk];
};

double excess(const LogitRow& p, const Softmax& P, const LogitRow* q, const Softmax& Q, int64_t block) {
  Excess rest(p, P, q, Q, block);
  double total = 0.0;
  while (rest.advance()) total += rest.sum;
  return total;
}

int64_t draw(const LogitRow& p, const Softmax& P, const LogitRow* q, const Softmax& Q, int64_t block, double mass) {
  Excess rest(p, P, q, Q, block);
  int64_t last = -1;
  double before = 0.0;
  while (rest.advance()) {
    if (rest.sum <= 0.0f) continue;
    const bool here = before + rest.sum > mass;
    double reached = before;
    for (int i = 0; i < rest.size; ++i) {
      if (rest.value[i] <= 0.0f) continue;
      reached += rest.value[i];
      last = rest.first + i;
      if (here && reached > mass) return last;
    }
    if (here) return last;
    before += rest.sum;
  }
  return last;
}

}  // namespace

extern const VerifyKernels verify_kernels = {block_sum, block_peak, find, excess, draw};

}  // namespace specdec::SPECDEC_TIER
