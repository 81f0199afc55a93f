// Verification's CUDA code on the host. As a library: verify_on_host(). As a program (SPECDEC_PROGRAM), which sanitisers
// need: calls it on the arguments in a file and prints the results.
#include "cuda_host.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/cuda/verify_walk.cuh"

using namespace specdec;
using namespace specdec::device;

namespace {

struct Call {
  Launch launch;
  Method method;
  int request;
  std::vector<Shared*> shared;
  std::vector<unsigned char*> tiles;
};

void run_block(void* argument, int block) {
  Call& call = *static_cast<Call*>(argument);
  verify_request(call.launch, call.method, call.request * call.launch.team + block, *call.shared[block],
                 call.tiles[block]);
}

}  // namespace

// What is neither zeroed nor written holds this.
constexpr int kPoison = 0xCB;

// `launch` is complete but for its scratch. Null, or what went wrong.
extern "C" const char* verify_on_host(const Launch* launch, int method, int readers) {
  Call call{*launch, static_cast<Method>(method), 0, {}, {}};
  int64_t zeroed;
  const int64_t bytes = lay_out(call.launch, call.method, nullptr, &zeroed);
  char* scratch = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64));
  std::memset(scratch, kPoison, bytes);
  std::memset(scratch, 0, zeroed);
  lay_out(call.launch, call.method, scratch, &zeroed);
  const char* failure = nullptr;
  for (call.request = 0; call.request < launch->batch && failure == nullptr; ++call.request) {
    for (int block = 0; block < launch->team; ++block) {
      call.shared.push_back(static_cast<Shared*>(std::malloc(sizeof(Shared))));
      call.tiles.push_back(static_cast<unsigned char*>(std::aligned_alloc(64, readers * kTile)));
      std::memset(static_cast<void*>(call.shared.back()), kPoison, sizeof(Shared));
      std::memset(call.tiles.back(), kPoison, readers * kTile);
    }
    failure = cuda_host::run(launch->team, (readers + 2) * kLanes, run_block, &call);
    for (Shared* memory : call.shared) std::free(memory);
    for (unsigned char* memory : call.tiles) std::free(memory);
    call.shared.clear();
    call.tiles.clear();
  }
  std::free(scratch);
  return failure;
}

extern "C" int launch_size() { return sizeof(Launch); }
