// The warp that answers a walk's questions about rows: it lets the readers pass over them and combines what they leave.
// All lanes do so alike, and so do the servers of all thread blocks of a team: all walks get the same answers.
#pragma once

#include "verify_passes.cuh"

namespace specdec::device {

enum class Ask : int32_t {
  kStop,
  kLink,
  kOpen,  // of `node`
  kMass,
  kDraw,
  kOverlap,
  kEntropy,
  kRenormalise,
  kProbability,  // of `token` in rows[side]
  kLogprob,      // of `token` in rows[kTarget]
  kExclude,      // `token`
};

// A question to the server, and its answer. The functions of specdec/rows.h say what they mean.
struct Question {
  Ask ask;
  int32_t node, token, side;
  int32_t excluded;  // tokens on the list of those
  int32_t epoch;     // another number whenever that list is another
  bool drafted;
  float u;
  Weight weight;
  double rho;
  Row rows[2];  // kOpen and kRenormalise answer here

  bool sound;
  int32_t drawn;
  float value;
  double mass;
  Overlap overlap;
};

class Server {
 public:
  __device__ Server(const Job& job, Question& question, Command& command)
      : passes_(job, command), launch_(job.launch), question_(question) {}

  __device__ __forceinline__ void serve() {
    for (;;) {
      sync_walk();
      switch (question_.ask) {
        case Ask::kStop:
          return passes_.stop();
        case Ask::kLink:
          passes_.run_on_team([&] { passes_.command.work = Work::kLink; });
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
  static __device__ Sums nobodys() { return {-1, -1, 0.0f, 0.0f, 0.0, -1, false}; }

  __device__ __forceinline__ void open() {
    const bool reads_draft = question_.drafted && launch_.sides[kDraft].data;
    const int node = question_.node;
    const Row unread = {node, -1, 0.0f, -kInf, 1.0};
    passes_.run_on_team([&] {
      Command& command = passes_.command;
      command.work = Work::kSum;
      command.num_excluded = 0;
      command.of[kTarget] = true;
      command.of[kDraft] = reads_draft;
      command.rows[kTarget] = command.rows[kDraft] = unread;
    });
    sums_ = {node, -1, 0.0f, 0.0f, 0.0, question_.epoch, true};
    const BlockSum* sums = passes_.last_sums<BlockSum>();
    // All that these sums tell is taken before a filter's passes go over them.
    bool sound = true;
    Row rows[2] = {unread, own_point()};
#pragma unroll
    for (int s = kTarget; s <= kDraft; ++s) {
      if (s == kDraft && !reads_draft) continue;
      rows[s] = unread;
      passes_.combine(sums, s, rows[s]);
      sound = sound && rows[s].total > 0.0 && rows[s].total < static_cast<double>(kInf);
      if (sound && !passes_.sampling(s).sampled()) {
        rows[s].point = passes_.point_of(sums, s, rows[s]);
        rows[s].total = 1.0;
        sound = rows[s].point >= 0 && rows[s].point < launch_.vocabulary;  // whatever stands in draft_vocab
      }
      sums += passes_.blocks(s);
    }
#pragma unroll
    for (int s = kTarget; s <= kDraft; ++s) {
      if (!sound || (s == kDraft && !reads_draft) || !passes_.sampling(s).filters()) continue;
      passes_.filter(s, rows[s]);
      sums_ = s == kTarget ? Sums{node, -1, 0.0f, 0.0f, 0.0, question_.epoch, true} : nobodys();
    }
    by_one_lane([&] {
      question_.sound = sound;
      question_.rows[kTarget] = rows[kTarget];
      if (question_.drafted) question_.rows[kDraft] = rows[kDraft];
    });
  }

  // The mass of weights or, where that is asked, a draw from them: of p itself where they have no mass.
  __device__ __forceinline__ void weigh() {
    const bool draws = question_.ask == Ask::kDraw;
    const Row p = question_.rows[kTarget], q = question_.rows[kDraft];
    Weight w = question_.weight;
    int excluded = question_.excluded, epoch = question_.epoch;
#pragma unroll 1
    for (;;) {
      const bool takes = w.c > 0.0f && q.node >= 0;
      auto pass = [&](Work work) {
        Command& command = passes_.command;
        command.work = work;
        command.of[kTarget] = true;
        command.of[kDraft] = takes;
        command.rows[kTarget] = p;
        command.rows[kDraft] = q;
        command.weight = w;
        command.excluded = passes_.excluded_list();
        command.num_excluded = excluded;
      };
      Sums wanted = {p.node, -1, 0.0f, 0.0f, 0.0, epoch, false};
      if (takes) wanted = {p.node, q.node, w.c, w.d, q.total, epoch, false};
      if (sums_.p != wanted.p || sums_.q != wanted.q || sums_.c != wanted.c || sums_.d != wanted.d ||
          sums_.q_total != wanted.q_total || sums_.epoch != wanted.epoch) {
        passes_.run_on_team([&] { pass(Work::kWeights); });
        sums_ = wanted;
      }
      int block;
      double inside;
      const double mass = find_block(p, question_.u, &block, &inside);
      if (!draws) return by_one_lane([&] { question_.mass = mass; });
      if (mass > 0.0 || (!takes && excluded == 0)) {
        passes_.run([&] {
          pass(Work::kDraw);
          passes_.command.block = block;
          passes_.command.inside = inside;
        });
        return by_one_lane([&] { question_.drawn = block * kBlock + passes_.command.column; });
      }
      w = Weight{};
      excluded = 0;
      epoch = -2;  // of no list
    }
  }

  // Sum of a block's weights, from the last pass.
  __device__ __forceinline__ double block_mass(const Row& p, float slope, int block) const {
    if (block >= passes_.blocks(kTarget)) return 0.0;
    if (!sums_.opened) return passes_.last_sums<double>()[block];
    // A block of less than this has no probability that fp32 can tell from 0, so nothing could be drawn from it.
    constexpr double kNothing = 0x1p-100;
    const double share = passes_.last_sums<BlockSum>()[block].under(p.peak, slope) / p.total;
    return share < kNothing ? 0.0 : share;
  }

  // Returns the sum over all blocks. Finds the block in which the running sum exceeds the share u of it, the last with
  // mass where rounding leaves none, and by how much the sum before that block falls short.
  __device__ __forceinline__ double find_block(const Row& p, float u, int* found, double* inside) const {
    const float slope = passes_.sampling(kTarget).slope;
    const int blocks = passes_.blocks(kTarget);
    const double mass = Passes::sum_over(blocks, [&](int block) { return block_mass(p, slope, block); });
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
    sums_ = nobodys();
    passes_.run_on_team([&] {
      Command& command = passes_.command;
      command.work = Work::kOverlap;
      command.of[kTarget] = command.of[kDraft] = true;
      command.rows[kTarget] = question_.rows[kTarget];
      command.rows[kDraft] = question_.rows[kDraft];
      command.inverse_rho = 1.0 / question_.rho;
    });
    const Overlap* sums = passes_.last_sums<Overlap>();
    const int blocks = passes_.blocks(kTarget);
    const double both = Passes::sum_over(blocks, [&](int block) { return sums[block].both; });
    const double capped = Passes::sum_over(blocks, [&](int block) { return sums[block].capped; });
    by_one_lane([&] { question_.overlap = {both, capped}; });
  }

  __device__ __forceinline__ void entropy() {
    const Row p = question_.rows[kTarget];
    sums_ = nobodys();
    passes_.run_on_team([&] { passes_.address(Work::kEntropy, kTarget, p); });
    const double* sums = passes_.last_sums<double>();
    const double sum = Passes::sum_over(passes_.blocks(kTarget), [&](int block) { return sums[block]; });
    by_one_lane([&] { question_.value = static_cast<float>(log(p.total) - sum / p.total * 0.6931471805599453); });
  }

  __device__ __forceinline__ void renormalise() {
    Row q = question_.rows[kDraft];
    const Row before = q;
    sums_ = nobodys();
    passes_.run_on_team([&] {
      passes_.address(Work::kSum, kDraft, q);
      passes_.command.excluded = passes_.excluded_list() + launch_.max_nodes;
      passes_.command.num_excluded = question_.excluded;
    });
    passes_.combine(passes_.last_sums<BlockSum>(), kDraft, q);
    const double shift = (static_cast<double>(q.peak) - before.peak) * passes_.sampling(kDraft).slope;
    by_one_lane([&] {
      question_.sound = q.total > 0.0;
      question_.mass = q.total / before.total * exp2(shift);
      if (q.total > 0.0) question_.rows[kDraft] = q;
    });
  }

  __device__ __forceinline__ void look_up() {
    const int s = question_.side;
    const Row row = question_.rows[s];
    const LogitRow logits(launch_.sides[s], passes_.job.place.first + row.node, row.cut);
    const int64_t column = logits.allows(question_.token) ? passes_.column_of(s, question_.token) : -1;
    const float x = column < 0 ? -kInf : logits.logit(column);
    const Sampling sampling = passes_.sampling(s);
    float value = Softmax(row, sampling.slope).of(x);
    if (question_.ask == Ask::kLogprob)
      value = static_cast<float>((static_cast<double>(x) - row.peak) * sampling.inverse - log(row.total));
    by_one_lane([&] { question_.value = value; });
  }

  // Puts a token at the end of the list, and where the draft has it.
  __device__ __forceinline__ void exclude() {
    const int64_t column = launch_.sides[kDraft].data ? passes_.column_of(kDraft, question_.token) : -1;
    by_one_lane([&] {
      int32_t* end = passes_.excluded_list() + question_.excluded;
      end[0] = question_.token;
      end[launch_.max_nodes] = static_cast<int32_t>(column);
    });
  }

  Passes passes_;
  const Launch& launch_;
  Question& question_;
  Sums sums_ = nobodys();
};

__device__ __noinline__ inline void serve(const Job& job, Question& question, Command& command) {
  Server(job, question, command).serve();
}

}  // namespace specdec::device
