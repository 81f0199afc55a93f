// What is as wide as the vocabulary: the warps that read rows, block by block.
//
// A server's commands are few numbers in shared memory. The readers of all thread blocks of a team take the blocks of a
// row in turns and leave a number or two for each in global memory. Walker, server and readers are code apart: a pass
// exists once in a kernel, whatever the number of places that ask for it, and none holds another's registers.
#pragma once

#include "verify_blocks.cuh"

namespace specdec::device {

// Which request a thread block works on.
struct Job {
  const Launch& launch;
  unsigned char* tiles;  // kTile bytes for each reader, where any are needed
  int request;
  int rank;  // of the thread block in its team
  int nodes;
  int64_t first;  // packed index of the request's root
};

__device__ inline int64_t thread_block_of(const Job& job) {
  return static_cast<int64_t>(job.request) * job.launch.team + job.rank;
}

// Excluded tokens; max_nodes entries further on, the draft's columns of them.
__device__ inline int32_t* excluded_list_of(const Job& job) {
  return job.launch.scratch.excluded + thread_block_of(job) * 2 * job.launch.max_nodes;
}

enum class Work : int32_t {
  kStop,
  kLink,     // the tree's children and siblings
  kSum,      // BlockSum of each block of the sides that are asked for
  kBins,     // of one side: sums of each bin of `keys`, left in each reader's tile
  kPeak,     // of one side: the first column of `block` that holds the peak
  kEntropy,  // of each block of p: its log_sum
  kWeights,  // of each block: sum of the weights of p and, where it is asked for, q
  kDraw,     // the column of `block` at which these weights sum up to `inside`
  kOverlap,  // of each block: its overlap
};

struct Command {
  Work work;
  bool of[2];  // which sides take part
  Row rows[2];
  Weight weight;
  double inverse_rho;
  KeyRange keys;
  const int32_t* excluded;  // columns that count as -inf, or whose weight is 0
  int32_t num_excluded;
  int32_t block;
  double inside;
  void* sums;
  int32_t column;  // answers kPeak and kDraw, within the block
};

// The blocks of a pass over `blocks` that fall to this reader; of one block alone, if it is the first reader.
struct Turns {
  int at, step, end;

  __device__ Turns(const Job& job, int blocks)
      : at(job.rank * readers() + warp()), step(job.launch.team * readers()), end(blocks) {}
  explicit __device__ Turns(int block) : at(block + warp()), step(1), end(block + 1) {
    if (warp() > 0) at = end;
  }
};

__device__ __forceinline__ void read_rows(const Job& job, Command& command) {
  const Work work = command.work;
  const int split = command.of[kTarget] ? job.launch.sides[kTarget].blocks() : 0;
  uint64_t* bins = reinterpret_cast<uint64_t*>(job.tiles + warp() * kTile);
  if (work == Work::kBins) {
    for (int b = 0; b < kBins; ++b) bins[b * kLanes + lane()] = 0;
  }
  Turns turn(job, split + (command.of[kDraft] ? job.launch.sides[kDraft].blocks() : 0));
  if (work == Work::kPeak) turn = Turns(command.block + (command.of[kDraft] ? split : 0));
  for (; turn.at < turn.end; turn.at += turn.step) {
    const int which = turn.at < split ? kTarget : kDraft, block = turn.at < split ? turn.at : turn.at - split;
    const Side& side = job.launch.sides[which];
    const Row& row = command.rows[which];
    const Sampling sampling = Sampling::of(side, job.request);
    Values x;
    LogitRow(side, job.first + row.node, row.cut).read(block, x);
    if (work == Work::kSum) {
      replace(command.excluded, command.num_excluded, block, -kInf, x);
      const BlockSum sum = sum_block(x, sampling.slope);
      if (lane() == 0) static_cast<BlockSum*>(command.sums)[turn.at] = sum;
    } else if (work == Work::kBins) {
      add_to_bins(x, command.keys, row.peak, sampling.temperature, bins);
    } else if (work == Work::kPeak) {
      const int column = first_column_of(x, row.peak);
      if (lane() == 0) command.column = column;
    } else {
      const double sum = log_sum(x, row.peak, sampling.slope);
      if (lane() == 0) static_cast<double*>(command.sums)[turn.at] = sum;
    }
  }
  if (work == Work::kBins) sum_bins(bins);
}

__device__ __forceinline__ void read_pairs(const Job& job, Command& command) {
  const Work work = command.work;
  const Side &target = job.launch.sides[kTarget], &draft = job.launch.sides[kDraft];
  const Row &p = command.rows[kTarget], &q = command.rows[kDraft];
  const Softmax P(p, Sampling::of(target, job.request).slope), Q(q, Sampling::of(draft, job.request).slope);
  Turns turn(job, target.blocks());
  if (work == Work::kDraw) turn = Turns(command.block);
  for (; turn.at < turn.end; turn.at += turn.step) {
    const int64_t block = turn.at;
    Values x, y;
    LogitRow(target, job.first + p.node, p.cut).read(block, x);
    if (!command.of[kDraft]) {
      each(y, [&](float& v, int) { v = 0.0f; });
    } else if (q.point >= 0) {
      const int64_t point = q.point - block * kBlock - lane_offset();
      each(y, [&](float& v, int at) { v = at == point ? 1.0f : 0.0f; });
    } else {
      const LogitRow row(draft, job.first + q.node, q.cut);
      if (draft.ids) {
        spread(row, Q, block, reinterpret_cast<float*>(job.tiles + warp() * kTile), y);
      } else {
        row.read(block, y);
        each(y, [&](float& v, int) { v = Q.of(v); });
      }
    }
    each(x, [&](float& v, int) { v = P.of(v); });
    if (work == Work::kOverlap) {
      const Overlap sums = overlap_of(x, y, command.inverse_rho);
      if (lane() == 0) static_cast<Overlap*>(command.sums)[block] = sums;
      continue;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
#pragma unroll
      for (int k = 0; k < kWide; ++k) x.at[i][k] = command.weight.of(x.at[i][k], y.at[i][k]);
    replace(command.excluded, command.num_excluded, block, 0.0f, x);
    if (work == Work::kDraw) {
      const int column = column_at(x, command.inside);
      if (lane() == 0) command.column = column;
    } else {
      const double sum = total_of(x);
      if (lane() == 0) static_cast<double*>(command.sums)[block] = sum;
    }
  }
}

// Children of each node in node order, as link_children() finds them, but each node looks for its own next sibling and
// first child, so that no thread waits for another's.
__device__ __forceinline__ void link(const Job& job) {
  const Launch& launch = job.launch;
  const int32_t* parents = launch.parents + job.first;
  const int32_t* tokens = launch.tokens + job.first;
  int32_t* links = launch.scratch.links + static_cast<int64_t>(job.request) * 2 * launch.max_nodes;
  auto parent_of = [&](int node) {
    const int32_t parent = parents[node], token = tokens[node];
    return parent >= 0 && parent < node && token >= 0 && token < launch.vocabulary ? parent : -1;
  };
  const int threads = readers() * kLanes;
  for (int node = job.rank * threads + static_cast<int>(threadIdx.x); node < job.nodes; node += launch.team * threads) {
    const int parent = node > 0 ? parent_of(node) : -1;
    int child = -1, sibling = -1;
    for (int other = node + 1; other < job.nodes && (child < 0 || (parent >= 0 && sibling < 0)); ++other) {
      const int up = parent_of(other);
      if (up == node && child < 0) child = other;
      if (up >= 0 && up == parent && sibling < 0) sibling = other;
    }
    links[node] = child;
    links[launch.max_nodes + node] = sibling;
  }
}

// A reader, until it is told to stop.
__device__ __forceinline__ void read(const Job& job, Command& command) {
  for (;;) {
    sync_rows();
    switch (command.work) {
      case Work::kStop:
        return;
      case Work::kLink:
        link(job);
        break;
      case Work::kWeights:
      case Work::kDraw:
      case Work::kOverlap:
        read_pairs(job, command);
        break;
      default:
        read_rows(job, command);
    }
    sync_rows();
  }
}

}  // namespace specdec::device
