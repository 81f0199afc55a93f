// The CUDA kernel of tree_layout, run by fibers on the host (cuda_host.h): a thread block a tree, as on a device.
#include "cuda_host.h"

// After the names that it takes from nvcc.
#include "../csrc/cuda/trees.cuh"

using namespace specdec::layout;

namespace {

struct Call {
  const Launch& launch;
  int64_t tree;
};

void run_block(void* argument, int) {
  const Call& call = *static_cast<Call*>(argument);
  static Shared shared;
  lay_out(call.launch, call.tree, shared);
}

}  // namespace

// Null, or what went wrong. Blocks run one after another, the last first: a GPU promises no order.
extern "C" const char* layout_on_host(const Launch* launch, int threads) {
  for (int64_t tree = launch->batch; tree >= 0; --tree) {
    Call call{*launch, tree};
    if (const char* failure = cuda_host::run(1, threads, run_block, &call)) return failure;
  }
  return nullptr;
}

extern "C" int launch_size() { return sizeof(Launch); }
