// Verification's CUDA code on the host. As a library: verify_on_host(). As a program, which sanitisers need
// (-DSPECDEC_PROGRAM): calls it on the arguments in a file and prints the outputs.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda_host.h"

// After the names that it takes from nvcc.
#include "verify_walk.cuh"

using namespace specdec;
using namespace specdec::device;

namespace {

// Memory that was neither zeroed nor written holds this.
constexpr int kPoison = 0xCB;

using cuda_host::Memory;
Memory allocate(int64_t bytes) { return cuda_host::allocate(bytes, kPoison); }

struct Call {
  const Launch& launch;
  Method method;
  int request;
  std::vector<Memory> shared, tiles;
};

void run_block(void* argument, int block) {
  const Call& call = *static_cast<Call*>(argument);
  verify_request(call.launch, call.method, call.request * call.launch.team + block,
                 *reinterpret_cast<Shared*>(call.shared[block].get()),
                 reinterpret_cast<unsigned char*>(call.tiles[block].get()));
}

}  // namespace

// `arguments` are complete but for their scratch. Null, or what went wrong.
extern "C" const char* verify_on_host(const Launch* arguments, int method, int readers) {
  Launch launch = *arguments;
  int64_t zeroed = 0;
  const Memory scratch = allocate(lay_out(launch, static_cast<Method>(method), nullptr, &zeroed));
  std::memset(scratch.get(), 0, static_cast<size_t>(zeroed));
  lay_out(launch, static_cast<Method>(method), scratch.get(), &zeroed);
  const char* failure = nullptr;
  for (int request = 0; request < launch.batch && failure == nullptr; ++request) {
    Call call{launch, static_cast<Method>(method), request, {}, {}};
    for (int block = 0; block < launch.team; ++block) {
      call.shared.push_back(allocate(sizeof(Shared)));
      call.tiles.push_back(allocate(readers * kTile));
    }
    failure = cuda_host::run(launch.team, (readers + 2) * kLanes, run_block, &call);
  }
  return failure;
}

extern "C" int launch_size() { return sizeof(Launch); }

#ifdef SPECDEC_PROGRAM

namespace {

template <typename T>
T read(std::FILE* file) {
  T value;
  if (std::fread(&value, sizeof(T), 1, file) != 1) std::abort();
  return value;
}

template <typename T>
void print(const T* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) std::printf("%d ", static_cast<int>(values[i]));
  std::printf("\n");
}

}  // namespace

// The file: method, readers; how many tensors, and of each where its address stands in the Launch, how far that is past
// a multiple of 16, its bytes; the Launch. Integers are int64.
int main(int, char** argv) {
  std::FILE* file = std::fopen(argv[1], "rb");
  if (file == nullptr) return 2;
  const auto method = static_cast<int>(read<int64_t>(file)), readers = static_cast<int>(read<int64_t>(file));
  std::vector<Memory> tensors;
  std::vector<std::pair<int64_t, char*>> pointers;
  for (int64_t left = read<int64_t>(file); left > 0; --left) {
    const auto field = read<int64_t>(file), skew = read<int64_t>(file), bytes = read<int64_t>(file);
    tensors.push_back(allocate(skew + bytes));
    char* data = tensors.back().get() + skew;
    if (std::fread(data, 1, static_cast<size_t>(bytes), file) != static_cast<size_t>(bytes)) return 2;
    pointers.emplace_back(field, data);
  }
  auto launch = read<Launch>(file);
  std::fclose(file);
  for (const auto& [field, data] : pointers) std::memcpy(reinterpret_cast<char*>(&launch) + field, &data, sizeof(data));
  const char* failure = verify_on_host(&launch, method, readers);
  if (failure != nullptr) {
    std::fprintf(stderr, "%s\n", failure);
    return 1;
  }
  const int64_t entries = int64_t{launch.batch} * (launch.max_depth + 1);
  print(launch.out_tokens, entries);
  print(launch.out_nodes, entries);
  print(launch.out_number, launch.batch);
  return 0;
}

#endif
