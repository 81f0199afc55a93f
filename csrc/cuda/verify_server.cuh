// The warp that answers a walk's questions about rows: it lets the readers pass over them and combines what they leave.
// The servers of a team's thread blocks do all of this alike, in the same order, so all walks get the same answers.
#pragma once

#include "verify_cut.cuh"

namespace specdec::device {

enum class Ask : int32_t {
  kStop,
  kLink,
  kOpen,  // of sides[kTarget], and of sides[kDraft] if `drafted`
  kMass,
  kDraw,
  kOverlap,
  kEntropy,
  kRenormalise,
  kProbability,  // of `token` in rows[side]
  kLogprob,      // of `token` in rows[kTarget]
  kExclude,
};

// A question to the server, and its answer. The functions of specdec/rows.h say what they mean.
struct Question {
  Ask ask;
  int32_t node, token, side, excluded;  // excluded: how many of the list
  int32_t epoch;                        // another number whenever that list is another
  bool drafted;
  float u;
  Weight weight;
  double rho;
  Row rows[2];  // kOpen and kRenormalise answer here

  int32_t drawn;
  float value;
  bool sound;
  double mass;
  Overlap overlap;
};

class Server {
 public:
  __device__ Server(const Job& job, Question& question, Command& command)
      : job_(job),
        launch_(job.launch),
        question_(question),
        command_(command),
        team_{job.place.rank, launch_.team, launch_.scratch.arrivals + static_cast<int64_t>(job.place.request) * kArrivalStride} {}

  __device__ __forceinline__ void serve() {
    for (;;) {
      sync_walk();
      switch (question_.ask) {
        case Ask::kStop:
          post([&] { command_.work = Work::kStop; });
          return;
        case Ask::kLink:
          run_on_team([&] { command_.work = Work::kLink; });
          break;
        case Ask::kOpen:
          open();
          break;
        case Ask::kMass:
        case Ask::kDraw:
          weigh();
          break;
        case Ask::kOverlap:
          overlap();
          break;
        case Ask::kEntropy:
          entropy();
          break;
        case Ask::kRenormalise:
          renormalise();
          break;
        case Ask::kProbability:
        case Ask::kLogprob:
          look_up();
          break;
        case Ask::kExclude:
          exclude();
          break;
      }
      sync_walk();
    }
  }

 private:
  // Of what the sums of the last pass are.
  struct Sums {
    int p, q;  // nodes, -1: none
    float c, d;
    double q_total;
    int epoch;
    bool opened;  // BlockSums of p itself, else sums of weights
  };

  template <typename Write>
  __device__ __forceinline__ void post(Write write) {
    by_one_lane(write);
    sync_rows();
  }

  // Lets the readers of this thread block work.
  template <typename Write>
  __device__ __forceinline__ void run(Write write) {
    post(write);
    sync_rows();
  }

  // The same in all thread blocks of the team, into new sums where a pass leaves some.
  template <typename Write>
  __device__ __forceinline__ void run_on_team(Write write) {
    run([&] {
      command_.sums = last_sums<void>();
      write();
    });
    team_.sync();
  }

  // Room for the next pass: two of them take turns. Between a pass and the reading of its sums lies a barrier of the
  // team; who writes a pass has passed the barrier of the one before, so all have read the one before that.
  __device__ void make_room() {
    last_is_first_ = !last_is_first_;
    sums_ = {-1, -1, 0.0f, 0.0f, 0.0, -1, false};
  }
  template <typename T>
  __device__ T* last_sums() const {
    const int64_t room = 2 * static_cast<int64_t>(job_.place.request) + (last_is_first_ ? 0 : 1);
    return static_cast<T*>(static_cast<void*>(launch_.scratch.sums + room * launch_.scratch.sums_size));
  }

  template <typename Part>
  static __device__ __forceinline__ double sum_over(int count, Part part) {
    double sum = 0.0;
    for (int block = lane(); block < count; block += kLanes) sum += part(block);
    return warp_sum(sum);
  }
  __device__ int target_blocks() const { return launch_.sides[kTarget].blocks(); }

  // Peak and total of a row from the sums of its blocks.
  static __device__ void combine(const BlockSum* sums, int blocks, float slope, Row& row) {
    float peak = kLowest;
    for (int block = lane(); block < blocks; block += kLanes) peak = fmaxf(peak, sums[block].peak);
    row.peak = peak = warp_max(peak);
    row.total = sum_over(blocks, [&](int block) { return sums[block].under(peak, slope); });
  }

  __device__ __forceinline__ void open() {
    const bool reads_draft = question_.drafted && launch_.sides[kDraft].data;
    make_room();
    run_on_team([&] {
      command_.work = Work::kSum;
      command_.num_excluded = 0;
      for (int s = 0; s < 2; ++s) {
        command_.of[s] = s == kTarget || reads_draft;
        command_.rows[s] = {question_.node, -1, 0.0f, -kInf, 1.0};
      }
    });
    bool sound = true;
    const BlockSum* sums = last_sums<BlockSum>();
    const BlockSum* first_sums = sums;
    sums_.p = question_.node;
    sums_.epoch = question_.epoch;
    sums_.opened = true;
    // Both sides are looked at before one is passed over again.
    Row rows[2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      rows[s] = own_point();
      if (s == kDraft && !reads_draft) continue;
      rows[s] = {question_.node, -1, 0.0f, -kInf, 1.0};
      const int blocks = launch_.sides[s].blocks();
      combine(sums, blocks, Sampling::of(launch_.sides[s], job_.place.request).slope, rows[s]);
      sound = sound && rows[s].total > 0.0 && rows[s].total < static_cast<double>(kInf);
      if (s == kTarget) sums += blocks;
    }
    by_one_lane([&] {
      question_.sound = sound;
      question_.rows[kTarget] = rows[kTarget];
      if (question_.drafted) question_.rows[kDraft] = rows[kDraft];
    });
    if (!sound) return;
#pragma unroll 1
    for (int s = 0; s < 2; ++s) {
      if (s == kTarget || reads_draft) settle(s, s == kTarget ? first_sums : sums);
    }
  }

  // What is left to find of a sound row of sums: at temperature 0 its first peak, else its cut and what that leaves.
  __device__ __forceinline__ void settle(int s, const BlockSum* sums) {
    const Side& side = launch_.sides[s];
    const Sampling sampling = Sampling::of(side, job_.place.request);
    Row row = question_.rows[s];
    if (!sampling.sampled()) {
      int block = 0;
      for (;; block += kLanes) {
        const int own = block + lane();
        const unsigned hits = __ballot_sync(kAll, own < side.blocks() && sums[own].peak == row.peak);
        if (hits == 0) continue;
        block += first_lane(hits);
        break;
      }
      run([&] {
        address(Work::kPeak, s, row);
        command_.block = block;
      });
      const int64_t column = static_cast<int64_t>(block) * kBlock + command_.column;
      row.point = side.ids ? __ldg(side.ids + column) : static_cast<int32_t>(column);
      row.total = 1.0;
    } else if (sampling.filters()) {
      auto sum = [&](const KeyRange& keys) {
        run([&] {
          address(Work::kBins, s, row);
          command_.keys = keys;
        });
        return gather_bins();
      };
      const CutFinder<decltype(sum)> finder(side, sampling, row.peak, sum);
      row.cut = finder.find(row.total);
      make_room();
      run_on_team([&] { address(Work::kSum, s, row); });
      combine(last_sums<BlockSum>(), side.blocks(), sampling.slope, row);
      if (s == kTarget) {
        sums_.p = row.node;
        sums_.epoch = question_.epoch;
        sums_.opened = true;
      }
    }
    by_one_lane([&] { question_.rows[s] = row; });
  }

  __device__ void address(Work work, int s, const Row& row) {
    command_.work = work;
    command_.num_excluded = 0;
    command_.of[s] = true;
    command_.of[1 - s] = false;
    command_.rows[s] = row;
  }

  // Lane b < kBins: what fell into bin b of the last pass, over the whole row.
  __device__ __forceinline__ uint64_t gather_bins() {
    bins_are_first_ = !bins_are_first_;
    const int64_t room = 2 * static_cast<int64_t>(job_.place.request) + (bins_are_first_ ? 0 : 1);
    uint64_t* totals = launch_.scratch.bins + room * launch_.team * kBins;
    uint64_t sum = 0;
    if (lane() < kBins) {
      for (int r = 0; r < readers(); ++r) sum += reinterpret_cast<const uint64_t*>(job_.tiles + r * kTile)[lane()];
      totals[job_.place.rank * kBins + lane()] = sum;
    }
    team_.sync();
    sum = 0;
    if (lane() < kBins) {
      for (int r = 0; r < launch_.team; ++r) sum += totals[r * kBins + lane()];
    }
    return sum;
  }

  // Mass of the weights, and a draw from them where that is asked: of p itself where they have no mass.
  __device__ __forceinline__ void weigh() {
    const bool draws = question_.ask == Ask::kDraw;
    const Row p = question_.rows[kTarget], q = question_.rows[kDraft];
    Weight w = question_.weight;
    int excluded = question_.excluded, epoch = question_.epoch;
#pragma unroll 1
    for (;;) {
      const bool takes = w.c > 0.0f && q.node >= 0;
      auto command = [&] {
        command_.of[kTarget] = true;
        command_.of[kDraft] = takes;
        command_.rows[kTarget] = p;
        command_.rows[kDraft] = q;
        command_.weight = w;
        command_.excluded = excluded_list();
        command_.num_excluded = excluded;
      };
      Sums wanted = {p.node, -1, 0.0f, 0.0f, 0.0, epoch, false};
      if (takes) wanted = {p.node, q.node, w.c, w.d, q.total, epoch, false};
      if (sums_.p != wanted.p || sums_.q != wanted.q || sums_.c != wanted.c || sums_.d != wanted.d ||
          sums_.q_total != wanted.q_total || sums_.epoch != wanted.epoch) {
        make_room();
        run_on_team([&] {
          command_.work = Work::kWeights;
          command();
        });
        sums_ = wanted;
      }
      int block;
      double inside;
      const double mass = find_block(p, question_.u, &block, &inside);
      if (!draws) return by_one_lane([&] { question_.mass = mass; });
      if (mass > 0.0 || (!takes && excluded == 0)) {
        run([&] {
          command_.work = Work::kDraw;
          command();
          command_.block = block;
          command_.inside = inside;
        });
        return by_one_lane([&] { question_.drawn = block * kBlock + command_.column; });
      }
      w = Weight{};
      excluded = 0;
      epoch = -2;  // of no list
    }
  }

  // Sum of a block's weights, from the last pass.
  __device__ double block_mass(const Row& p, float slope, int block) const {
    if (block >= target_blocks()) return 0.0;
    if (!sums_.opened) return last_sums<double>()[block];
    // A block of less than this has no probability that fp32 can tell from 0, so nothing could be drawn from it.
    constexpr double kNothing = 0x1p-100;
    const double share = last_sums<BlockSum>()[block].under(p.peak, slope) / p.total;
    return share < kNothing ? 0.0 : share;
  }

  // Returns the sum over all blocks. Finds the block in which the running sum exceeds the share u of it, the last with
  // mass where rounding leaves none, and by how much the sum before that block falls short.
  __device__ __forceinline__ double find_block(const Row& p, float u, int* found, double* inside) const {
    const float slope = Sampling::of(launch_.sides[kTarget], job_.place.request).slope;
    const int blocks = target_blocks();
    const double mass = sum_over(blocks, [&](int block) { return block_mass(p, slope, block); });
    const double wanted = u * mass;
    double before = 0.0;
    *found = 0;
    *inside = wanted;
    for (int base = 0; base < blocks; base += kLanes) {
      const double own = block_mass(p, slope, base + lane()), upto = before + warp_scan(own);
      const unsigned some = __ballot_sync(kAll, own > 0.0), over = __ballot_sync(kAll, own > 0.0 && upto > wanted);
      if (some) {
        const int from = over ? first_lane(over) : last_lane(some);
        *found = base + from;
        *inside = wanted - __shfl_sync(kAll, upto - own, from);
        if (over) break;
      }
      before = __shfl_sync(kAll, upto, kLanes - 1);
    }
    return mass;
  }

  __device__ __forceinline__ void overlap() {
    make_room();
    run_on_team([&] {
      command_.work = Work::kOverlap;
      command_.of[kTarget] = command_.of[kDraft] = true;
      command_.rows[kTarget] = question_.rows[kTarget];
      command_.rows[kDraft] = question_.rows[kDraft];
      command_.inverse_rho = 1.0 / question_.rho;
    });
    const Overlap* sums = last_sums<Overlap>();
    const double both = sum_over(target_blocks(), [&](int block) { return sums[block].both; });
    const double capped = sum_over(target_blocks(), [&](int block) { return sums[block].capped; });
    by_one_lane([&] { question_.overlap = {both, capped}; });
  }

  __device__ __forceinline__ void entropy() {
    const Row p = question_.rows[kTarget];
    make_room();
    run_on_team([&] { address(Work::kEntropy, kTarget, p); });
    const double* sums = last_sums<double>();
    const double sum = sum_over(target_blocks(), [&](int block) { return sums[block]; });
    by_one_lane([&] { question_.value = static_cast<float>(log(p.total) - sum / p.total * 0.6931471805599453); });
  }

  __device__ __forceinline__ void renormalise() {
    Row q = question_.rows[kDraft];
    const Row before = q;
    make_room();
    run_on_team([&] {
      address(Work::kSum, kDraft, q);
      command_.excluded = excluded_list() + launch_.max_nodes;
      command_.num_excluded = question_.excluded;
    });
    const float slope = Sampling::of(launch_.sides[kDraft], job_.place.request).slope;
    combine(last_sums<BlockSum>(), launch_.sides[kDraft].blocks(), slope, q);
    const double share = q.total / before.total * exp2((static_cast<double>(q.peak) - before.peak) * slope);
    by_one_lane([&] {
      question_.sound = q.total > 0.0;
      question_.mass = share;
      if (q.total > 0.0) question_.rows[kDraft] = q;
    });
  }

  __device__ int64_t column_of(const Side& side, int32_t token) const {
    if (side.ids == nullptr) return token;
    const int64_t column = lower_bound(side.ids, side.columns, token);
    return column < side.columns && __ldg(side.ids + column) == token ? column : -1;
  }

  __device__ __forceinline__ void look_up() {
    const int s = question_.side;
    const Side& side = launch_.sides[s];
    const Row row = question_.rows[s];
    const LogitRow logits(side, job_.place.first + row.node, row.cut);
    const int64_t column = logits.allows(question_.token) ? column_of(side, question_.token) : -1;
    const float x = column < 0 ? -kInf : logits.logit(column);
    const Sampling sampling = Sampling::of(side, job_.place.request);
    float value = Softmax(row, sampling.slope).of(x);
    if (question_.ask == Ask::kLogprob)
      value = static_cast<float>((static_cast<double>(x) - row.peak) * sampling.inverse - log(row.total));
    by_one_lane([&] { question_.value = value; });
  }

  __device__ __forceinline__ void exclude() {
    const Side& draft = launch_.sides[kDraft];
    const int64_t column = draft.data ? column_of(draft, question_.token) : -1;
    by_one_lane([&] {
      excluded_list()[question_.excluded] = question_.token;
      excluded_list()[question_.excluded + launch_.max_nodes] = static_cast<int32_t>(column);
    });
  }

  __device__ int32_t* excluded_list() const { return excluded_list_of(job_); }

  const Job& job_;
  const Launch& launch_;
  Question& question_;
  Command& command_;
  Team team_;
  Sums sums_ = {-1, -1, 0.0f, 0.0f, 0.0, -1, false};
  bool last_is_first_ = false, bins_are_first_ = false;
};

__device__ __noinline__ inline void serve(const Job& job, Question& question, Command& command) {
  Server(job, question, command).serve();
}

}  // namespace specdec::device
