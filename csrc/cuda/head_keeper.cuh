// What becomes of a tile of products: logits, of which each warp keeps those of some requests. A lane has a row.
#pragma once

#include "head_best.cuh"

namespace specdec::head {

// What a row is called, and what is done to its products.
struct Fact {
  float scale, bias;
  int32_t id, known;
};

class Keeper {
 public:
  __device__ __forceinline__ Keeper(const Launch& launch, const Run& run, char* shared)
      : launch_(launch), run_(run), shared_(shared) {}

  __device__ __forceinline__ void start() const {
    for (int v = warp(); v < run_.size; v += warps()) {
      if (lane() == 0) state(v) = state_of(launch_, run_.first + v);
      set_sums(v, no_sums());
    }
    __syncwarp();
  }

  // The fact of the row at `index` of the list, if it is one that this thread of a tile's rows looks up.
  __device__ __forceinline__ Fact look_up(int index) const {
    const bool mine = static_cast<int>(threadIdx.x) < launch_.tile_rows() && index < run_.end;
    const int row = mine ? row_at(launch_, run_, index) : -1;
    Fact fact = {1.0f, 0.0f, row, row >= 0};
    if (row < 0) return fact;
    if (launch_.scale != nullptr && launch_.format != Format::kInt4) fact.scale = __ldg(launch_.scale + row);
    if (launch_.bias != nullptr)
      fact.bias = load_float(launch_.bias + static_cast<int64_t>(row) * bytes_of(launch_.bias_type), launch_.bias_type);
    if (launch_.token_ids != nullptr) fact.id = __ldg(launch_.token_ids + row);
    return fact;
  }
  __device__ __forceinline__ Fact& fact(int tile, int r) const {
    return reinterpret_cast<Fact*>(shared_ + launch_.shared.facts)[tile % 2 * launch_.tile_rows() + r];
  }

  // The rows `start` .. `end` of the list, which are the first ones of a tile.
  __device__ __forceinline__ void take(int tile, int start, int end) const {
    for (int v = warp(); v < run_.size; v += warps()) {
      const State& s = state(v);
      Sums sums = get_sums(v);
      for (int base = start; base < end; base += kLanes) {
        const int index = base + lane();
        float logit = -kInf;
        int32_t id = -1;
        if (index < end) {
          logit = logit_of(tile, v, index - start, &id);
          if (launch_.all_logits != nullptr)
            launch_.all_logits[static_cast<int64_t>(run_.first + v) * launch_.count + index] = logit;
          add(sums, logit, s.slope);
        }
        offer(v, logit, id);
      }
      set_sums(v, sums);
    }
  }

  // What was found goes to the second kernel.
  __device__ __forceinline__ void finish() const {
    for (int v = warp(); v < run_.size; v += warps()) {
      const Sums sums = merged_over_lanes(get_sums(v));
      if (lane() == 0) launch_.found_sums[static_cast<int64_t>(run_.first + v) * launch_.blocks + run_.rank] = sums;
      const List list = List::of(shared_, launch_, v);
      const int count = list.cut(state(v).count, launch_.k);
      for (int i = lane(); i < launch_.k; i += kLanes) {
        const int64_t at = (static_cast<int64_t>(run_.first + v) * launch_.k + i) * launch_.blocks + run_.rank;
        launch_.found_keys[at] = i < count ? list.keys[i] : -__builtin_huge_val();
        launch_.found_logits[at] = i < count ? list.logits[i] : -kInf;
        launch_.found_ids[at] = i < count ? list.ids[i] : -1;
      }
    }
  }

 private:
  __device__ __forceinline__ State& state(int v) const {
    return reinterpret_cast<State*>(shared_ + launch_.shared.states)[v];
  }

  // Each lane has sums of its own.
  __device__ __forceinline__ double* sums_at(int v) const {
    return reinterpret_cast<double*>(shared_ + launch_.shared.sums) + 3 * v * kLanes + lane();
  }
  __device__ __forceinline__ Sums get_sums(int v) const {
    const double* from = sums_at(v);
    return {from[0], from[kLanes], from[2 * kLanes]};
  }
  __device__ __forceinline__ void set_sums(int v, const Sums& sums) const {
    double* to = sums_at(v);
    to[0] = sums.anchor;
    to[kLanes] = sums.sum;
    to[2 * kLanes] = sums.weighted;
  }

  __device__ __forceinline__ float logit_of(int tile, int v, int r, int32_t* id) const {
    const Fact f = fact(tile, r);
    *id = f.id;
    if (!f.known) return -kInf;
    const int rows = launch_.tile_rows(), slice = launch_.vectors() * rows;
    const float* parts =
        reinterpret_cast<const float*>(shared_ + launch_.shared.partial) + tile % 2 * kSlices * slice + v * rows + r;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kSlices; ++i)
      sum += launch_.split() ? parts[i * slice] + parts[i * slice + 8 * rows] : parts[i * slice];
    return sum * f.scale + f.bias;
  }

  // Logits that may be among the k best go behind the list, which is cut when it is full.
  __device__ __forceinline__ void offer(int v, float logit, int32_t id) const {
    State& s = state(v);
    bool hopeful = logit > -kInf && most_of(s, logit) >= s.reach;
    if (!__ballot_sync(kAll, hopeful)) return;
    const List list = List::of(shared_, launch_, v);
    int count = s.count;
    if (count > launch_.capacity() - kLanes) {
      count = list.cut(count, launch_.k);
      if (lane() == 0) {
        s.last = list.keys[launch_.k - 1];
        s.reach = reach_of(s.last);
      }
      __syncwarp();
    }
    double key = 0.0;
    if (hopeful) {
      key = key_of(s, logit, id);
      hopeful = key >= s.last && key < __builtin_huge_val();
    }
    const unsigned all = __ballot_sync(kAll, hopeful);
    if (hopeful) list.set(count + __popc(all & ((1u << lane()) - 1)), key, logit, id);
    __syncwarp();
    if (lane() == 0) s.count = count + __popc(all);
    __syncwarp();
  }

  const Launch& launch_;
  const Run& run_;
  char* const shared_;
};

}  // namespace specdec::head
