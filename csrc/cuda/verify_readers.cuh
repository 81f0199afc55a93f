// What is as wide as the vocabulary: the warps that read rows, block by block.
//
// A server's commands are few numbers in shared memory. The readers of all thread blocks of a team take the blocks of a
// row in turns and leave a number or two for each in global memory. Walker, server and readers are code apart: a pass
// exists once in a kernel, whatever the number of places that ask for it, and none holds another's registers.
#pragma once

#include "verify_blocks.cuh"

namespace specdec::device {

// Which request a thread block works on. In shared memory: the readers have no register to spare.
struct Place {
  int32_t request;
  int32_t rank;  // of the thread block in its team
  int32_t nodes;
  int64_t first;  // packed index of the request's root
};

struct Job {
  const Launch& launch;
  const Place& place;
  unsigned char* tiles;  // kTile bytes for each reader
};

__device__ inline int64_t thread_block_of(const Job& job) {
  return static_cast<int64_t>(job.place.request) * job.launch.team + job.place.rank;
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
      : at(job.place.rank * readers() + warp()), step(job.launch.team * readers()), end(blocks) {}
  explicit __device__ Turns(int block) : at(block + warp()), step(1), end(block + 1) {
    if (warp() > 0) at = end;
  }
};

__device__ __noinline__ inline void read_rows(const Job& job, Command& command) {
  const Work work = command.work;
  const int split = command.of[kTarget] ? job.launch.sides[kTarget].blocks() : 0;
  uint64_t* bins = reinterpret_cast<uint64_t*>(job.tiles + warp() * kTile);
  if (work == Work::kBins) {
    for (int b = 0; b < kBins; ++b) bins[b * kLanes + lane()] = 0;
  }
  Turns turn(job, split + (command.of[kDraft] ? job.launch.sides[kDraft].blocks() : 0));
  if (work == Work::kPeak) turn = Turns(command.block);
  for (; turn.at < turn.end; turn.at += turn.step) {
    const int which = turn.at < split ? kTarget : kDraft, block = turn.at < split ? turn.at : turn.at - split;
    const Side& side = job.launch.sides[which];
    const Row& row = command.rows[which];
    const Sampling sampling = Sampling::of(side, job.place.request);
    Values x;
    LogitRow(side, job.place.first + row.node, row.cut).read(block, x);
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

// The block's draft probabilities pass through the reader's tile: there are no registers for them beside those of p.
__device__ __noinline__ inline void read_pairs(const Job& job, Command& command) {
  const Work work = command.work;
  const int32_t point = command.of[kDraft] ? command.rows[kDraft].point : -1;
  float* tile = reinterpret_cast<float*>(job.tiles + warp() * kTile) + lane_offset();
  Turns turn(job, job.launch.sides[kTarget].blocks());
  if (work == Work::kDraw) turn = Turns(command.block);
  for (; turn.at < turn.end; turn.at += turn.step) {
    const int64_t block = turn.at;
    Values x;
#pragma unroll 1
    for (int s = command.of[kDraft] && point < 0 ? kDraft : kTarget; s >= kTarget; --s) {
      const Side& side = job.launch.sides[s];
      const Row& row = command.rows[s];
      const LogitRow logits(side, job.place.first + row.node, row.cut);
      const Softmax softmax(row, Sampling::of(side, job.place.request).slope);
      if (s == kDraft && side.ids != nullptr) {
        spread(logits, softmax, block, tile - lane_offset());
        continue;
      }
      logits.read(block, x);
      each(x, [&](float& v, int) { v = softmax.of(v); });
      if (s == kDraft) each(x, [&](float& v, int at) { tile[at] = v; });
    }
    if (work == Work::kOverlap) {
      const Overlap sums = overlap_of(x, tile, command.inverse_rho);
      if (lane() == 0) static_cast<Overlap*>(command.sums)[block] = sums;
      continue;
    }
    if (point >= 0) {
      const int64_t at_point = point - block * kBlock - lane_offset();
      each(x, [&](float& v, int at) { v = at == at_point ? command.weight.of(v, 1.0f) : v; });
    } else if (command.of[kDraft]) {
      each(x, [&](float& v, int at) { v = command.weight.of(v, tile[at]); });
    }
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
__device__ __noinline__ inline void link(const Job& job) {
  const Launch& launch = job.launch;
  const int32_t* parents = launch.parents + job.place.first;
  const int32_t* tokens = launch.tokens + job.place.first;
  int32_t* links = launch.scratch.links + static_cast<int64_t>(job.place.request) * 2 * launch.max_nodes;
  auto parent_of = [&](int node) {
    const int32_t parent = parents[node], token = tokens[node];
    return parent >= 0 && parent < node && token >= 0 && token < launch.vocabulary ? parent : -1;
  };
  const int threads = readers() * kLanes;
  for (int node = job.place.rank * threads + static_cast<int>(threadIdx.x); node < job.place.nodes;
       node += launch.team * threads) {
    const int parent = node > 0 ? parent_of(node) : -1;
    int child = -1, sibling = -1;
    for (int other = node + 1; other < job.place.nodes && (child < 0 || (parent >= 0 && sibling < 0)); ++other) {
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
