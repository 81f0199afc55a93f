// Attention of draft trees against a KV cache, in jobs: some query rows against some slots of one KV head.
//
// A row is one query head of one node; the heads that share a KV head stand side by side, so every slot is read once
// for all of them. Slots are cut where a multiple of kAttentionSplit stands, or of twice as many where the request, or
// the requests that share a prefix, have many rows; never by what else is in the batch or by the number of threads.
// Each cut leaves a partial result that `merge` adds in the order of the slots.
#pragma once

#include <stdint.h>

#include "dtypes.h"

namespace specdec {

constexpr int64_t kAttentionBlock = 64;    // slots that are scored at a time: their visibility is one 64-bit word
constexpr int64_t kAttentionSplit = 1024;  // slots that one job reads; see above

enum class CacheType : int32_t { kFloat, kBf16, kHalf, kE4m3, kE5m2, kInt8 };

// One cache, [.., slot, .., column] with any strides. Dense: `outer` walks requests. Paged: it walks blocks.
struct AttentionCache {
  const void* data;
  int64_t outer, head, slot, column;  // strides in elements
  int64_t columns;
  const float* scale;  // [Hkv] or null
};

// One row of the query, and what it may see of its request.
struct AttentionNode {
  int64_t node;    // row of query, bits and depths
  int64_t first;   // that of its tree's node 0
  int64_t size;    // nodes of its tree
  int64_t prefix;  // committed slots; the tree's follow
  int64_t shared;  // how many of these slots another request's cache holds
};

struct AttentionArgs {
  DType query_type;
  CacheType cache_type;
  int64_t group;                   // query heads per KV head
  const void* query;               // [N, Hq, D], columns side by side
  int64_t query_node, query_head;  // strides in elements
  AttentionCache keys, values;
  const int32_t* table;  // [B, table_width] blocks of `page` slots; null: dense
  int64_t table_width, page, pages;
  const int32_t* depths;  // [N]
  const uint64_t* bits;   // [N, words]
  int64_t words;
  double scale, softcap;  // softcap 0: off
  int64_t window;         // 0: off
  const float* sinks;     // [Hq] or null
  void* out;              // [N, Hq, Dv], contiguous
  float* lse;             // [N, Hq] or null
  int64_t query_heads;
  int64_t job_rows;        // the most rows of a job, a multiple of 32
  int64_t partial_stride;  // floats from one row of a partial result to the next
};

// Rows first_row .. first_row + rows - 1 of a list of nodes: row r is head r % group of nodes[r / group].
struct AttentionRows {
  const AttentionNode* nodes;
  int64_t first_row, rows, kv_head;
};

struct AttentionJob {
  AttentionRows at;
  int64_t source;  // row of the dense cache or of the block table
  int64_t first_slot, last_slot;
  bool shared;                    // these are slots that several requests share
  float* partial;                 // of each row: weighted values, then (most, sum): scores are relative to 2^most
  const AttentionJob* following;  // what this thread does next, or null: its first slots are fetched in good time
};

// Partial results of the same rows: those of shared slots first.
struct AttentionMerge {
  AttentionRows at;
  float* parts[2];
  int64_t splits[2];   // how many there are
  int64_t strides[2];  // floats from one split to the next
};

struct AttentionKernels {
  int64_t (*scratch_bytes)(const AttentionArgs& args);
  void (*attend)(const AttentionArgs& args, const AttentionJob& job, void* scratch);
  void (*merge)(const AttentionArgs& args, const AttentionMerge& merge);
};

}  // namespace specdec
