// How a server lets rows be read: its commands to the readers of its thread block, and what comes back from those of
// the whole team. The servers of a team do all of this alike and in the same order.
#pragma once

#include "verify_cut.cuh"

namespace specdec::device {

class Passes {
 public:
  __device__ Passes(const Job& job, Command& command)
      : job(job),
        launch(job.launch),
        command(command),
        team_{job.place.rank, launch.team, launch.scratch.arrivals + int64_t{job.place.request} * kArrivalStride} {}

  __device__ int blocks(int s) const { return launch.sides[s].blocks(); }
  __device__ Sampling sampling(int s) const { return Sampling::of(launch.sides[s], job.place.request); }
  __device__ int32_t* excluded_list() const { return excluded_list_of(job); }

  // Lets the readers of this thread block do what `write` commands.
  template <typename Write>
  __device__ __forceinline__ void run(Write write) {
    post(write);
    sync_rows();
  }

  // The same in all thread blocks of the team. What a pass leaves for each block is in last_sums() then.
  //
  // Two rooms take turns. Who writes into one has passed the barrier of the pass before, so nobody reads what the pass
  // before that left there, as long as everybody reads what a pass left before the next one starts.
  template <typename Write>
  __device__ __forceinline__ void run_on_team(Write write) {
    last_is_first_ = !last_is_first_;
    run([&] {
      command.sums = last_sums<void>();
      write();
    });
    team_.sync();
  }

  template <typename T>
  __device__ T* last_sums() const {
    const int64_t room = 2 * int64_t{job.place.request} + (last_is_first_ ? 0 : 1);
    return static_cast<T*>(static_cast<void*>(launch.scratch.sums + room * launch.scratch.sums_size));
  }

  // Tells the readers to leave.
  __device__ __forceinline__ void stop() {
    post([&] { command.work = Work::kStop; });
  }

  // Commands work on one row alone.
  __device__ __forceinline__ void address(Work work, int s, const Row& row) {
    command.work = work;
    command.num_excluded = 0;
    command.of[s] = true;
    command.of[1 - s] = false;
    command.rows[s] = row;
  }

  // Sum of part(b) over b < count.
  template <typename Part>
  static __device__ __forceinline__ double sum_over(int count, Part part) {
    double sum = 0.0;
    for (int block = lane(); block < count; block += kLanes) sum += part(block);
    return warp_sum(sum);
  }

  // Peak and total of a row from the sums of its blocks.
  __device__ __forceinline__ void combine(const BlockSum* sums, int s, Row& row) const {
    const int count = blocks(s);
    const float slope = sampling(s).slope;
    float peak = kLowest;
    for (int block = lane(); block < count; block += kLanes) peak = fmaxf(peak, sums[block].peak);
    row.peak = peak = warp_max(peak);
    row.total = sum_over(count, [&](int block) { return sums[block].under(peak, slope); });
  }

  // The token of a row's first peak, from the sums of its blocks.
  __device__ __forceinline__ int32_t point_of(const BlockSum* sums, int s, const Row& row) {
    int block = 0;
    for (;; block += kLanes) {
      const int own = block + lane();
      const unsigned hits = __ballot_sync(kAll, own < blocks(s) && sums[own].peak == row.peak);
      if (hits == 0) continue;
      block += first_lane(hits);
      break;
    }
    run([&] {
      address(Work::kPeak, s, row);
      command.block = block;
    });
    const int64_t column = int64_t{block} * kBlock + command.column;
    return launch.sides[s].ids ? __ldg(launch.sides[s].ids + column) : static_cast<int32_t>(column);
  }

  // Filters a row: its cut, and the total of what that leaves.
  __device__ __forceinline__ void filter(int s, Row& row) {
    auto sum = [&](const KeyRange& keys) {
      run([&] {
        address(Work::kBins, s, row);
        command.keys = keys;
      });
      return gather_bins();
    };
    row.cut = CutFinder<decltype(sum)>(launch.sides[s], sampling(s), row.peak, sum).find(row.total);
    run_on_team([&] { address(Work::kSum, s, row); });
    combine(last_sums<BlockSum>(), s, row);
  }

  // Where a token stands in a row; -1: nowhere.
  __device__ __forceinline__ int64_t column_of(int s, int32_t token) const {
    const Side& side = launch.sides[s];
    if (side.ids == nullptr) return token;
    const int64_t column = lower_bound(side.ids, side.columns, token);
    return column < side.columns && __ldg(side.ids + column) == token ? column : -1;
  }

  const Job& job;
  const Launch& launch;
  Command& command;

 private:
  template <typename Write>
  static __device__ __forceinline__ void post(Write write) {
    by_one_lane(write);
    sync_rows();
  }

  // Lane b < kBins: what fell into bin b of a pass of this thread block's readers and of all others'.
  __device__ __forceinline__ uint64_t gather_bins() {
    bins_are_first_ = !bins_are_first_;
    const int64_t room = 2 * int64_t{job.place.request} + (bins_are_first_ ? 0 : 1);
    uint64_t* totals = launch.scratch.bins + room * launch.team * kBins;
    uint64_t sum = 0;
    if (lane() < kBins) {
      for (int r = 0; r < readers(); ++r) sum += reinterpret_cast<const uint64_t*>(job.tiles + r * kTile)[lane()];
      totals[job.place.rank * kBins + lane()] = sum;
    }
    team_.sync();
    sum = 0;
    if (lane() < kBins) {
      for (int r = 0; r < launch.team; ++r) sum += totals[r * kBins + lane()];
    }
    return sum;
  }

  Team team_;
  bool last_is_first_ = false, bins_are_first_ = false;
};

}  // namespace specdec::device
