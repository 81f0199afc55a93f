// The plan of a call: its jobs, and threads that take them one by one. For the torch edge only.
//
// A piece is what is merged together: some rows of one KV head, with the slots that their requests share and those of
// each request. Pieces go in waves, so that partial results take bounded memory however long the caches are. Neither
// waves nor how many rows a job takes change a result (of finite values: whether an infinite one with a weight of 0
// makes a row NaN depends on whether all rows of its job see it): rows are computed alone, and slots are cut at places
// that depend on the request alone (where it shares a prefix, on the requests that share it).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "attention.h"
#include "tiers.h"

namespace specdec {

class AttentionPlan {
 public:
  struct Request {
    int64_t source;  // the request whose cache holds the shared slots; -1: none are shared
    int64_t index, first, size, prefix, shared;
    int64_t lowest;  // the first slot that a window leaves to any of its nodes
  };

  AttentionPlan(const AttentionArgs& args, std::vector<Request> requests, int64_t kv_heads, int64_t threads)
      : args_(args), requests_(std::move(requests)), threads_(threads) {
    // Requests whose shared slots lie in one place stand side by side.
    std::stable_sort(requests_.begin(), requests_.end(),
                     [](const Request& a, const Request& b) { return a.source < b.source; });
    for (const Request& r : requests_)
      for (int64_t i = 0; i < r.size; ++i) nodes_.push_back({r.first + i, r.first, r.size, r.prefix, r.shared});
    int64_t row = 0;
    for (size_t first = 0, last; first < requests_.size(); first = last) {
      const int64_t source = requests_[first].source;
      last = first + 1;
      while (source >= 0 && last < requests_.size() && requests_[last].source == source) ++last;
      row = add_pieces(first, last, row, kv_heads);
    }
  }

  void run(const torch::stable::Tensor& like) {
    const std::vector<size_t> waves = cut_into_waves();
    scratch_bytes_ = kernel_.scratch_bytes(args_);
    thread_bytes_ = scratch_bytes_ + args_.job_rows * args_.partial_stride * kFloat;
    const int64_t bytes = threads_ * thread_bytes_ + most_floats_ * kFloat + kLine;
    auto buffer = torch::stable::new_empty(like, {bytes}, torch::headeronly::ScalarType::Byte);
    scratch_ = static_cast<char*>(buffer.mutable_data_ptr());
    scratch_ += (kLine - reinterpret_cast<uintptr_t>(scratch_) % kLine) % kLine;
    partial_ = reinterpret_cast<float*>(scratch_ + threads_ * thread_bytes_);
    for (size_t i = 0; i + 1 < waves.size(); ++i) run_wave(waves[i], waves[i + 1]);
  }

 private:
  static constexpr int64_t kFloat = sizeof(float), kLine = 64;
  static constexpr int64_t kWaveFloats = int64_t{1} << 22;    // partial results of a wave, if no piece has more
  static constexpr int64_t kThreadFloats = int64_t{1} << 19;  // as many for each thread where that is more
  static constexpr int64_t kFewestRows = 32;                  // of a job that is cut for the sake of threads

  // Slots of one cache, and the rows that look at them.
  struct Span {
    int64_t source;
    int64_t first_row, rows;
    int64_t first_slot, last_slot;
    int64_t split;  // slots are cut at multiples of this; a remainder of less than half stays with what is before
    bool shared;
    int64_t partial = 0;  // floats before it in the wave's buffer

    int64_t start() const { return first_slot / split * split; }
    int64_t splits() const {
      if (first_slot >= last_slot || rows == 0) return 0;
      return std::max<int64_t>(1, (last_slot - start() + split / 2) / split);
    }
  };

  struct Piece {
    int64_t kv_head;
    std::vector<Span> spans;  // that of the shared slots first, if there is one

    bool is_one_job_wide() const { return spans.size() == 1 && spans[0].splits() == 1; }
  };

  int64_t floats_of(const Piece& piece) const {
    int64_t floats = 0;
    for (const Span& span : piece.spans) floats += span.splits() * span.rows * args_.partial_stride;
    return piece.is_one_job_wide() ? 0 : floats;  // merged at once, out of the thread's own memory
  }

  // What many rows leave behind takes long to merge, and more of them can be taken apart for the sake of threads.
  static int64_t split_of(int64_t rows) { return rows > 64 ? 2 * kAttentionSplit : kAttentionSplit; }

  // Of requests first .. last - 1, which share slots or are one, and whose rows begin at `row`; where they end.
  int64_t add_pieces(size_t first, size_t last, int64_t row, int64_t kv_heads) {
    int64_t rows = 0;
    for (size_t i = first; i < last; ++i) rows += requests_[i].size * args_.group;
    for (int64_t from = row; from < row + rows; from += args_.job_rows) {
      const int64_t to = std::min(from + args_.job_rows, row + rows), source = requests_[first].source;
      std::vector<Span> spans;
      Span common = {source, from, to - from, INT64_MAX, 0, split_of(rows), true};
      if (source >= 0) spans.push_back(common);
      int64_t begin = row;
      for (size_t i = first; i < last; ++i) {
        const Request& r = requests_[i];
        const int64_t end = begin + r.size * args_.group, start = std::max(begin, from), stop = std::min(end, to);
        begin = end;
        if (start >= stop) continue;
        common.first_slot = std::min({common.first_slot, r.lowest, r.shared});
        common.last_slot = std::max(common.last_slot, r.shared);
        spans.push_back({r.index, start, stop - start, std::max(r.shared, r.lowest), r.prefix + r.size,
                         split_of(r.size * args_.group), false});
      }
      if (source >= 0) spans[0] = common;
      for (int64_t head = 0; head < kv_heads; ++head) pieces_.push_back({head, spans});
    }
    return row + rows;
  }

  // Where waves begin, and the end.
  std::vector<size_t> cut_into_waves() {
    const int64_t room = std::max(kWaveFloats, kThreadFloats * threads_);
    std::vector<size_t> waves = {0};
    int64_t used = 0;
    for (size_t i = 0; i < pieces_.size(); ++i) {
      const int64_t floats = floats_of(pieces_[i]);
      if (used > 0 && used + floats > room) {
        waves.push_back(i);
        used = 0;
      }
      int64_t at = used;
      for (Span& span : pieces_[i].spans) {
        span.partial = at;
        at += span.splits() * span.rows * args_.partial_stride;
      }
      used += floats;
      most_floats_ = std::max(most_floats_, used);
    }
    waves.push_back(pieces_.size());
    return waves;
  }

  void run_wave(size_t first, size_t last) const {
    int64_t rows = args_.job_rows;
    std::vector<AttentionJob> jobs = jobs_of(first, last, rows);
    // Cut at multiples of kFewestRows, so that the same rows end up in the same lanes.
    while (rows > kFewestRows && static_cast<int64_t>(jobs.size()) < 4 * threads_) {
      rows = std::max(kFewestRows, rows / 2 / kFewestRows * kFewestRows);
      jobs = jobs_of(first, last, rows);
    }
    for_each(jobs.size(), [&](size_t i, size_t following, int64_t thread) {
      AttentionJob job = jobs[i];
      job.following = following < jobs.size() ? &jobs[following] : nullptr;
      char* scratch = scratch_ + thread * thread_bytes_;
      const bool at_once = job.partial == nullptr;
      if (at_once) job.partial = reinterpret_cast<float*>(scratch + scratch_bytes_);
      kernel_.attend(args_, job, scratch);
      if (at_once) kernel_.merge(args_, {job.at, {nullptr, job.partial}, {0, 1}, {0, 0}});
    });
    const std::vector<AttentionMerge> merges = merges_of(first, last);
    for_each(merges.size(), [&](size_t i, size_t, int64_t) { kernel_.merge(args_, merges[i]); });
  }

  std::vector<AttentionJob> jobs_of(size_t first, size_t last, int64_t rows_of_job) const {
    std::vector<AttentionJob> jobs;
    for (size_t i = first; i < last; ++i) {
      for (const Span& span : pieces_[i].spans) {
        const int64_t splits = span.splits();
        for (int64_t split = 0; split < splits; ++split) {
          const int64_t start = span.start() + split * span.split;
          for (int64_t row = 0; row < span.rows; row += rows_of_job) {
            AttentionJob job = {
                {nodes_.data(), span.first_row + row, std::min(rows_of_job, span.rows - row), pieces_[i].kv_head},
                span.source,
                std::max(start, span.first_slot),
                split + 1 == splits ? span.last_slot : start + span.split,
                span.shared,
                nullptr,
                nullptr};
            if (!pieces_[i].is_one_job_wide())
              job.partial = partial_ + span.partial + (split * span.rows + row) * args_.partial_stride;
            jobs.push_back(job);
          }
        }
      }
    }
    return jobs;
  }

  std::vector<AttentionMerge> merges_of(size_t first, size_t last) const {
    std::vector<AttentionMerge> merges;
    for (size_t i = first; i < last; ++i) {
      if (pieces_[i].is_one_job_wide()) continue;
      const Span& common = pieces_[i].spans[0];
      for (const Span& span : pieces_[i].spans) {
        if (span.shared) continue;
        AttentionMerge merge = {{nodes_.data(), span.first_row, span.rows, pieces_[i].kv_head}, {}, {}, {}};
        const auto add = [&](int which, const Span& of) {
          merge.parts[which] = partial_ + of.partial + (span.first_row - of.first_row) * args_.partial_stride;
          merge.splits[which] = of.splits();
          merge.strides[which] = of.rows * args_.partial_stride;
        };
        if (common.shared) add(0, common);
        add(1, span);
        merges.push_back(merge);
      }
    }
    return merges;
  }

  // work(i, following, thread) for all i < count. Cores differ, and some are disturbed, so threads take what is next
  // when they are done; one ahead where there is enough for all, so that what follows can be fetched. Else it is
  // `count`.
  template <class F>
  void for_each(size_t count, const F& work) const {
    std::atomic<size_t> next{0};
    const size_t threads = std::min(static_cast<size_t>(threads_), count);
    torch::stable::parallel_for(0, static_cast<int64_t>(threads), 1, [&](int64_t first, int64_t last) {
      for (int64_t thread = first; thread < last; ++thread) {
        for (size_t i = next.fetch_add(1), following; i < count; i = following) {
          const bool ahead = i + threads < count;
          following = ahead ? next.fetch_add(1) : count;
          work(i, following, thread);
          if (!ahead) following = next.fetch_add(1);
        }
      }
    });
  }

  const AttentionArgs& args_;
  const AttentionKernels& kernel_ = *kernels().attention;
  std::vector<Request> requests_;
  const int64_t threads_;
  std::vector<AttentionNode> nodes_;
  std::vector<Piece> pieces_;
  int64_t most_floats_ = 0, scratch_bytes_ = 0, thread_bytes_ = 0;
  char* scratch_ = nullptr;
  float* partial_ = nullptr;
};

}  // namespace specdec
