// One request from its first node to its outputs, by a team of thread blocks. In each of them one warp walks; all walks
// of a team ask alike and are answered alike, and the first thread block's writes the outputs.
#pragma once

#include "verify_server.cuh"

namespace specdec::device {

// The rows of one request as specdec/rows.h wants them: questions to the server, and what a walk keeps for itself.
class CudaRows {
 public:
  __device__ CudaRows(const Job& job, Question& question) : job_(job), launch_(job.launch), question_(question) {}

  __device__ __forceinline__ bool open(int node, bool drafted, Row* p, Row* q) {
    forget();
    ask(Ask::kOpen, [&] {
      question_.node = node;
      question_.drafted = drafted;
    });
    *p = question_.rows[kTarget];
    if (drafted) *q = question_.rows[kDraft];
    return question_.sound;
  }

  __device__ __forceinline__ int32_t top(int node) {
    Row p, q;
    return open(node, false, &p, &q) ? p.point : -1;
  }

  __device__ __forceinline__ float target(const Row& p, int32_t token) {
    if (p.point >= 0) return token == p.point ? 1.0f : 0.0f;
    return look_up(Ask::kProbability, kTarget, p, token);
  }
  __device__ __forceinline__ float draft(const Row& q, int32_t token) {
    if (q.point >= 0) return token == q.point ? 1.0f : 0.0f;
    return look_up(Ask::kProbability, kDraft, q, token);
  }
  __device__ __forceinline__ float logprob(const Row& p, int32_t token) {
    if (p.point >= 0) return token == p.point ? 0.0f : -kInf;
    return look_up(Ask::kLogprob, kTarget, p, token);
  }

  __device__ __forceinline__ float entropy(const Row& p) {
    if (p.point >= 0) return 0.0f;
    ask(Ask::kEntropy, [&] { question_.rows[kTarget] = p; });
    return question_.value;
  }

  __device__ __forceinline__ double mass(const Row& p, const Row& q, Weight w) {
    if (p.point >= 0) return excluded(p.point) ? 0.0 : w.of(1.0f, w.c > 0.0f && q.node >= 0 ? draft(q, p.point) : 0.0f);
    ask(Ask::kMass, [&] { weigh(p, q, w, 0.0f); });
    return question_.mass;
  }

  __device__ __forceinline__ int32_t draw(const Row& p, const Row& q, Weight w, float u) {
    if (p.point >= 0) return p.point;
    ask(Ask::kDraw, [&] { weigh(p, q, w, u); });
    return question_.drawn;
  }

  __device__ __forceinline__ Overlap overlap(const Row& p, const Row& q, double rho) {
    if (p.point >= 0 || q.point >= 0) {
      const int32_t token = p.point >= 0 ? p.point : q.point;
      const double capped = target(p, token) / rho, drafted = draft(q, token);
      return capped < drafted ? Overlap{capped, capped} : Overlap{drafted, 0.0};
    }
    ask(Ask::kOverlap, [&] {
      question_.rows[kTarget] = p;
      question_.rows[kDraft] = q;
      question_.rho = rho;
    });
    return question_.overlap;
  }

  __device__ __forceinline__ bool renormalise(Row* q, double* share) {
    ask(Ask::kRenormalise, [&] { question_.rows[kDraft] = *q; });
    if (!question_.sound) return false;
    *share = question_.mass;
    *q = question_.rows[kDraft];
    return true;
  }

  __device__ __forceinline__ void exclude(int32_t token) {
    if (excluded(token)) return;
    ask(Ask::kExclude, [&] { question_.token = token; });
    ++excluded_;
    ++epoch_;
  }
  __device__ __forceinline__ bool excluded(int32_t token) const {
    const int32_t* list = excluded_list_of(job_);
    for (int base = 0; base < excluded_; base += kLanes) {
      if (__ballot_sync(kAll, base + lane() < excluded_ && list[base + lane()] == token)) return true;
    }
    return false;
  }
  __device__ __forceinline__ void forget() {
    if (excluded_ > 0) ++epoch_;
    excluded_ = 0;
  }

  __device__ __forceinline__ int mark(int node) const { return marks()[node]; }
  __device__ __forceinline__ void set_mark(int node, int value) {
    by_one_lane([&] { marks()[node] = value; });
  }

  __device__ __forceinline__ void save(int depth, const Frame& frame) {
    by_one_lane([&] { frames()[depth] = frame; });
  }
  __device__ __forceinline__ Frame load(int depth) const { return frames()[depth]; }

  __device__ __forceinline__ bool wants_logprobs() const { return launch_.out_logprobs != nullptr; }
  __device__ __forceinline__ void emit(int depth, int node, int32_t token, float logprob) {
    if (job_.place.rank != 0 || lane() != 0) return;
    const int64_t at = static_cast<int64_t>(job_.place.request) * (launch_.max_depth + 1) + depth;
    launch_.out_tokens[at] = token;
    launch_.out_nodes[at] = node;
    if (launch_.out_logprobs) launch_.out_logprobs[at] = logprob;
  }

  __device__ __forceinline__ void link_children() {
    ask(Ask::kLink, [] {});
  }
  __device__ __forceinline__ void stop() {
    by_one_lane([&] { question_.ask = Ask::kStop; });
    sync_walk();
  }

 private:
  template <typename Write>
  __device__ __forceinline__ void ask(Ask what, Write write) {
    by_one_lane([&] {
      question_.ask = what;
      question_.excluded = excluded_;
      question_.epoch = epoch_;
      write();
    });
    sync_walk();
    sync_walk();
  }

  __device__ __forceinline__ void weigh(const Row& p, const Row& q, Weight w, float u) {
    question_.rows[kTarget] = p;
    question_.rows[kDraft] = q;
    question_.weight = w;
    question_.u = u;
  }

  __device__ __forceinline__ float look_up(Ask what, int side, const Row& row, int32_t token) {
    ask(what, [&] {
      question_.side = side;
      question_.rows[side] = row;
      question_.token = token;
    });
    return question_.value;
  }

  __device__ int32_t* marks() const { return launch_.scratch.marks + thread_block_of(job_) * launch_.max_nodes; }
  __device__ Frame* frames() const { return launch_.scratch.frames + thread_block_of(job_) * (launch_.max_depth + 1); }

  const Job& job_;
  const Launch& launch_;
  Question& question_;
  int excluded_ = 0, epoch_ = 0;
};

__device__ __noinline__ inline void walk_request(const Job& job, Method method, Question& question) {
  const Launch& launch = job.launch;
  const int64_t first = job.place.first;
  CudaRows rows(job, question);
  Tree tree = {launch.tokens + first,
               launch.parents ? launch.parents + first : nullptr,
               nullptr,
               nullptr,
               launch.counts ? launch.counts + first : nullptr,
               job.place.nodes,
               launch.max_depth,
               launch.vocabulary};
  if (tree.parents) {
    rows.link_children();
    tree.first_child = launch.scratch.links + static_cast<int64_t>(job.place.request) * 2 * launch.max_nodes;
    tree.next_sibling = tree.first_child + launch.max_nodes;
  }
  const Coins coins = {launch.accept_uniforms ? launch.accept_uniforms + first : nullptr,
                       launch.final_uniforms ? launch.final_uniforms + job.place.request : nullptr,
                       launch.seed ? static_cast<uint64_t>(launch.seed[job.place.request]) : 0,
                       launch.offset ? static_cast<uint64_t>(launch.offset[job.place.request]) : 0};
  const Lossy lossy = {launch.judge ? launch.judge + first : nullptr, launch.synthetic, launch.lenience};
  const int number = tree.nodes > 0 ? walk(method, Request<CudaRows>{rows, tree, coins, lossy}) : 0;
  rows.stop();
  if (job.place.rank != 0) return;
  __syncwarp();  // one lane has emitted, perhaps entries of a request that turned out broken
  for (int i = number + lane(); i <= launch.max_depth; i += kLanes) {
    const int64_t at = static_cast<int64_t>(job.place.request) * (launch.max_depth + 1) + i;
    launch.out_tokens[at] = launch.out_nodes[at] = -1;
    if (launch.out_logprobs) launch.out_logprobs[at] = __builtin_nanf("");
  }
  if (lane() == 0) launch.out_number[job.place.request] = number;
}

// What the warps of a thread block tell each other.
struct Shared {
  Place place;
  Question question;
  Command command;
};

// One thread's part. `tiles`: kTile bytes for each reader.
__device__ __forceinline__ void verify_request(const Launch& launch, Method method, int thread_block, Shared& shared,
                                               unsigned char* tiles) {
  if (threadIdx.x == 0) {
    const int request = thread_block / launch.team;
    // Bounds hold for any cu_nodes; whether they make sense is checked under SPECDEC_DEBUG.
    int64_t first = launch.cu_nodes[request], end = launch.cu_nodes[request + 1];
    first = first < 0 ? 0 : first < launch.nodes ? first : launch.nodes;
    end = end < first ? first : end < launch.nodes ? end : launch.nodes;
    const int64_t nodes = end - first < launch.max_nodes ? end - first : launch.max_nodes;
    shared.place = {request, thread_block % launch.team, static_cast<int32_t>(nodes), first};
  }
  __syncthreads();
  const Job job = {launch, shared.place, tiles};
  if (warp() < readers())
    read(job, shared.command);
  else if (warp() == readers())
    serve(job, shared.question, shared.command);
  else
    walk_request(job, method, shared.question);
}

}  // namespace specdec::device
