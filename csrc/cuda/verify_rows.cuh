// The rows of one request as specdec/rows.h wants them. The walking warps of all thread blocks of a team call these
// functions alike, all lanes of them, and get the same answers: after a pass each combines the blocks' sums for itself,
// all in the same order.
#pragma once

#include "verify_cut.cuh"

namespace specdec::device {

class CudaRows {
 public:
  __device__ CudaRows(const Launch& launch, Shared& shared, const unsigned char* tiles, const Team& team)
      : launch_(launch), shared_(shared), tiles_(tiles), team_(team) {}

  __device__ __noinline__ bool open(int node, bool drafted, Row* p, Row* q) {
    forget();
    const bool reads_draft = drafted && launch_.draft.data;
    *p = unread(node);
    if (drafted) *q = reads_draft ? unread(node) : own_point();
    BlockSum* sums = new_sums<BlockSum>();
    run_on_team({Work::kSum, true, reads_draft, *p, *q});
    combine(sums, launch_.target, shared_.p, p);
    bool sound = is_sound(*p);
    if (reads_draft) {
      combine(sums + launch_.target.blocks(), launch_.draft, shared_.q, q);
      sound = sound && is_sound(*q);
    }
    if (!sound) return false;
    sums_are_ = {node, true};
    settle(launch_.target, shared_.p, sums, false, p);
    if (reads_draft) settle(launch_.draft, shared_.q, sums + launch_.target.blocks(), true, q);
    return true;
  }

  __device__ int32_t top(int node) {
    Row p, q;
    return open(node, false, &p, &q) ? p.point : -1;
  }

  __device__ float target(const Row& p, int32_t token) const {
    if (p.point >= 0) return token == p.point ? 1.0f : 0.0f;
    return Softmax(p, shared_.p.slope).of(logit(launch_.target, p, token));
  }

  __device__ float draft(const Row& q, int32_t token) const {
    if (q.point >= 0) return token == q.point ? 1.0f : 0.0f;
    return Softmax(q, shared_.q.slope).of(logit(launch_.draft, q, token));
  }

  __device__ __noinline__ float logprob(const Row& p, int32_t token) const {
    if (p.point >= 0) return token == p.point ? 0.0f : -kInf;
    const double shifted = static_cast<double>(logit(launch_.target, p, token)) - p.peak;
    return static_cast<float>(shifted * shared_.p.inverse - log(p.total));
  }

  __device__ __noinline__ float entropy(const Row& p) {
    if (p.point >= 0) return 0.0f;
    const double* sums = new_sums<double>();
    run_on_team({Work::kEntropy, true, false, p});
    const double sum = sum_over_blocks([&](int block) { return sums[block]; });
    return static_cast<float>(log(p.total) - sum / p.total * 0.6931471805599453);
  }

  __device__ __noinline__ double mass(const Row& p, const Row& q, Weight w) {
    if (p.point >= 0) return excluded(p.point) ? 0.0 : w.of(1.0f, weighs(q, w) ? draft(q, p.point) : 0.0f);
    sum_weights(p, q, w);
    return sum_over_blocks([&](int block) { return block_mass(p, block); });
  }

  __device__ __noinline__ int32_t draw(const Row& p, const Row& q, Weight w, float u) {
    if (p.point >= 0) return p.point;
    for (;;) {
      Command command = {Work::kDraw, true, weighs(q, w), p, q, w};
      sum_weights(p, q, w);
      if (find_block(p, u, &command)) {
        run(command, {excluded_list(), excluded_});
        return command.block * kBlock + shared_.column;
      }
      if (excluded_ == 0 && !weighs(q, w)) return 0;  // p has mass, so never
      forget();
      w = Weight{};
    }
  }

  __device__ __noinline__ Overlap overlap(const Row& p, const Row& q, double rho) {
    if (p.point >= 0 || q.point >= 0) {
      const int32_t token = p.point >= 0 ? p.point : q.point;
      const double capped = target(p, token) / rho, drafted = draft(q, token);
      return capped < drafted ? Overlap{capped, capped} : Overlap{drafted, 0.0};
    }
    const Overlap* sums = new_sums<Overlap>();
    run_on_team({Work::kOverlap, true, true, p, q, Weight{}, 1.0 / rho});
    return {sum_over_blocks([&](int block) { return sums[block].both; }),
            sum_over_blocks([&](int block) { return sums[block].capped; })};
  }

  __device__ __noinline__ bool renormalise(Row* q, double* share) {
    const Row before = *q;
    const BlockSum* sums = new_sums<BlockSum>();
    run_on_team({Work::kSum, false, true, *q, *q}, {excluded_list() + launch_.max_nodes, excluded_});
    combine(sums, launch_.draft, shared_.q, q);
    *share = q->total / before.total * exp2((static_cast<double>(q->peak) - before.peak) * shared_.q.slope);
    return q->total > 0.0;
  }

  __device__ __noinline__ void exclude(int32_t token) {
    if (excluded(token)) return;
    const int64_t column = launch_.draft.data ? column_of(launch_.draft, token) : -1;
    keep([&] {
      excluded_list()[excluded_] = token;
      excluded_list()[excluded_ + launch_.max_nodes] = static_cast<int32_t>(column);
    });
    ++excluded_;
    sums_are_ = {};
  }

  __device__ __noinline__ bool excluded(int32_t token) const {
    for (int base = 0; base < excluded_; base += kLanes) {
      const bool own = base + lane() < excluded_ && excluded_list()[base + lane()] == token;
      if (__ballot_sync(kAll, own)) return true;
    }
    return false;
  }

  __device__ void forget() {
    if (excluded_ > 0) sums_are_ = {};
    excluded_ = 0;
  }

  __device__ int mark(int node) const { return marks()[node]; }
  __device__ void set_mark(int node, int value) {
    keep([&] { marks()[node] = value; });
  }

  __device__ __noinline__ void save(int depth, const Frame& frame) {
    keep([&] { frames()[depth] = frame; });
  }
  __device__ Frame load(int depth) const { return frames()[depth]; }

  __device__ bool wants_logprobs() const { return launch_.out_logprobs != nullptr; }
  __device__ void emit(int depth, int node, int32_t token, float logprob) {
    if (team_.rank != 0 || lane() != 0) return;
    const int64_t at = static_cast<int64_t>(shared_.request) * (launch_.max_depth + 1) + depth;
    launch_.out_tokens[at] = token;
    launch_.out_nodes[at] = node;
    if (launch_.out_logprobs) launch_.out_logprobs[at] = logprob;
  }

  __device__ void link_children() { run_on_team({Work::kLink}); }
  __device__ void stop() { post({Work::kStop}, {nullptr, 0}); }

 private:
  // Of what the sums of the last pass are. Which tokens are excluded apart: when that changes, they are nobody's.
  struct Sums {
    int p = -1;
    bool opened = false;  // BlockSums of p itself, else sums of weights
    int q = -1;
    float c = 0.0f, d = 0.0f;
    double q_total = 0.0;
  };

  struct Columns {
    const int32_t* at;
    int count;
  };

  static __device__ Row unread(int node) { return {node, -1, 0.0f, -kInf, 1.0}; }
  static __device__ bool is_sound(const Row& row) { return row.total > 0.0 && row.total < static_cast<double>(kInf); }

  // Whether drafts take anything from p.
  static __device__ bool weighs(const Row& q, Weight w) { return w.c > 0.0f && q.node >= 0; }

  // Room for the next pass: two of them take turns. Between a pass and the reading of its sums lies a barrier of the
  // team; who writes a pass has passed the barrier of the one before, so all have read the one before that.
  template <typename T>
  __device__ T* new_sums() {
    last_is_first_ = !last_is_first_;
    sums_are_ = {};
    return reinterpret_cast<T*>(last_sums());
  }
  __device__ double* last_sums() const {
    const int64_t room = 2 * static_cast<int64_t>(shared_.request) + (last_is_first_ ? 0 : 1);
    return launch_.scratch.sums + room * launch_.scratch.sums_size;
  }

  __device__ __noinline__ void post(Command command, Columns excluded) {
    if (lane() == 0) {
      command.excluded = excluded.at;
      command.num_excluded = excluded.count;
      command.sums = last_sums();
      shared_.command = command;
    }
    __syncwarp();
    __syncthreads();
  }

  // Work for this thread block alone.
  __device__ void run(const Command& command, Columns excluded = {nullptr, 0}) {
    post(command, excluded);
    __syncthreads();
  }

  __device__ void run_on_team(const Command& command, Columns excluded = {nullptr, 0}) {
    run(command, excluded);
    team_.sync();
  }

  template <typename Part>
  static __device__ double sum_over(int count, Part part) {
    double sum = 0.0;
    for (int block = lane(); block < count; block += kLanes) sum += part(block);
    return warp_sum(sum);
  }
  template <typename Part>
  __device__ double sum_over_blocks(Part part) const {
    return sum_over(launch_.target.blocks(), part);
  }

  // Peak and total of a row from the sums of its blocks.
  __device__ void combine(const BlockSum* sums, const Side& side, const Sampling& sampling, Row* row) const {
    float peak = kLowest;
    for (int block = lane(); block < side.blocks(); block += kLanes) peak = fmaxf(peak, sums[block].peak);
    row->peak = warp_max(peak);
    row->total = sum_over(side.blocks(), [&](int block) { return sums[block].under(row->peak, sampling.slope); });
  }

  // What is left to find of a sound row: at temperature 0 its first peak, else its cut.
  __device__ void settle(const Side& side, const Sampling& sampling, const BlockSum* sums, bool is_draft, Row* row) {
    Command command = {Work::kPeak, !is_draft, is_draft, *row, *row};
    if (!sampling.sampled()) {
      for (int base = 0;; base += kLanes) {
        const int own = base + lane();
        const unsigned hits = __ballot_sync(kAll, own < side.blocks() && sums[own].peak == row->peak);
        if (hits == 0) continue;
        command.block = base + first_lane(hits);
        break;
      }
      run(command);
      const int64_t column = static_cast<int64_t>(command.block) * kBlock + shared_.column;
      row->point = side.ids ? __ldg(side.ids + column) : static_cast<int32_t>(column);
      row->total = 1.0;
    } else if (sampling.filters.any()) {
      auto sum_bins = [&](double scale, uint32_t low, uint32_t high, int spare, int shift) {
        command.work = Work::kBins;
        command.keys = {low, high, spare, shift, sampling.filters.temperature, scale};
        return gather_bins(command);
      };
      row->cut = CutFinder(side, sampling.filters, row->peak, sum_bins).find(row->total);
      command.p.cut = command.q.cut = row->cut;
      command.work = Work::kSum;
      const BlockSum* left = new_sums<BlockSum>();
      run_on_team(command);
      combine(left, side, sampling, row);
      if (!is_draft) sums_are_ = {row->node, true};
    }
  }

  // Lane b < kBins: what falls into bin b of a pass, over the whole row.
  __device__ uint64_t gather_bins(const Command& command) {
    bins_are_first_ = !bins_are_first_;
    const int64_t room = 2 * static_cast<int64_t>(shared_.request) + (bins_are_first_ ? 0 : 1);
    uint64_t* totals = launch_.scratch.bins + room * team_.size * kBins;
    run(command);
    uint64_t sum = 0;
    if (lane() < kBins) {
      for (int w = 0; w < workers(); ++w) sum += reinterpret_cast<const uint64_t*>(tiles_ + w * kTile)[lane()];
      totals[team_.rank * kBins + lane()] = sum;
    }
    team_.sync();
    sum = 0;
    if (lane() < kBins) {
      for (int r = 0; r < team_.size; ++r) sum += totals[r * kBins + lane()];
    }
    return sum;
  }

  __device__ int64_t column_of(const Side& side, int32_t token) const {
    if (side.ids == nullptr) return token;
    const int64_t column = lower_bound(side.ids, side.columns, token);
    return column < side.columns && __ldg(side.ids + column) == token ? column : -1;
  }

  // -inf where a token has no probability.
  __device__ __noinline__ float logit(const Side& side, const Row& row, int32_t token) const {
    const LogitRow logits(side, shared_.first + row.node, row.cut);
    const int64_t column = logits.allows(token) ? column_of(side, token) : -1;
    return column < 0 ? -kInf : logits.logit(column);
  }

  // Leaves these weights' sums in the last pass, by a new one if need be.
  __device__ void sum_weights(const Row& p, const Row& q, Weight w) {
    const bool takes = weighs(q, w);
    Sums wanted = {p.node};
    if (takes) wanted = {p.node, false, q.node, w.c, w.d, q.total};
    if (sums_are_.p == wanted.p && sums_are_.q == wanted.q && sums_are_.c == wanted.c && sums_are_.d == wanted.d &&
        sums_are_.q_total == wanted.q_total)
      return;
    new_sums<double>();
    run_on_team({Work::kWeights, true, takes, p, q, w}, {excluded_list(), excluded_});
    sums_are_ = wanted;
  }

  // The sum of a block's weights, from the last pass.
  __device__ double block_mass(const Row& p, int block) const {
    if (!sums_are_.opened) return last_sums()[block];
    // A block of less than this has no probability that fp32 can tell from 0, so nothing could be drawn from it.
    constexpr double kNothing = 0x1p-100;
    const BlockSum& sum = reinterpret_cast<const BlockSum*>(last_sums())[block];
    const double share = sum.under(p.peak, shared_.p.slope) / p.total;
    return share < kNothing ? 0.0 : share;
  }

  // The block in which the running sum of the weights exceeds the share u of the whole, and by how much the sum before
  // it falls short; the last with mass where rounding leaves none. False if none has mass.
  __device__ bool find_block(const Row& p, float u, Command* command) const {
    const int blocks = launch_.target.blocks();
    auto scan = [&](int base, double* own) {
      *own = base + lane() < blocks ? block_mass(p, base + lane()) : 0.0;
      return warp_scan(*own);
    };
    double wanted = 0.0, before = 0.0, own;
    for (int base = 0; base < blocks; base += kLanes) wanted += __shfl_sync(kAll, scan(base, &own), kLanes - 1);
    if (!(wanted > 0.0)) return false;
    wanted *= u;
    for (int base = 0; base < blocks; base += kLanes) {
      const double upto = before + scan(base, &own);
      const unsigned some = __ballot_sync(kAll, own > 0.0), over = __ballot_sync(kAll, own > 0.0 && upto > wanted);
      if (some) {
        const int from = over ? first_lane(over) : last_lane(some);
        command->block = base + from;
        command->inside = wanted - __shfl_sync(kAll, upto - own, from);
        if (over) break;
      }
      before = __shfl_sync(kAll, upto, kLanes - 1);
    }
    return true;
  }

  // What a thread block keeps for itself is written by one lane: before, none may still read what was there; after, all
  // may read it.
  template <typename Write>
  __device__ void keep(Write write) const {
    __syncwarp();
    if (lane() == 0) write();
    __syncwarp();
  }

  __device__ int64_t own() const { return static_cast<int64_t>(shared_.request) * team_.size + team_.rank; }
  __device__ int32_t* excluded_list() const { return launch_.scratch.excluded + own() * 2 * launch_.max_nodes; }
  __device__ int32_t* marks() const { return launch_.scratch.marks + own() * launch_.max_nodes; }
  __device__ Frame* frames() const { return launch_.scratch.frames + own() * (launch_.max_depth + 1); }

  const Launch& launch_;
  Shared& shared_;
  const unsigned char* const tiles_;
  Team team_;
  Sums sums_are_;
  bool last_is_first_ = false, bins_are_first_ = false;
  int excluded_ = 0;
};

}  // namespace specdec::device
