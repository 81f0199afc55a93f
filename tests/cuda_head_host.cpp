// The head's CUDA code on the host. As a library: head_on_host(). As a program, which sanitisers need
// (-DSPECDEC_PROGRAM): calls it on the arguments in a file and writes what became of all tensors to another.
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "cuda_host.h"

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i)
    picked |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return picked;
}
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }

// After the names that it takes from nvcc.
#include "head_warp.cuh"

namespace specdec::head {

// What a tensor core does, from its documentation: products and their sum are exact here, and rounded once.
template <class T>
float from_16(uint32_t bits);
template <>
float from_16<Bf16>(uint32_t bits) {
  return from_bf16(bits & 0xFFFF);
}
template <>
float from_16<Half>(uint32_t bits) {
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (uint32_t i = 0; i < all.size(); ++i) all[i] = from_half(i);
    return all;
  }();
  return values[bits & 0xFFFF];
}
template <class T>
uint32_t to_16(float x);
template <>
uint32_t to_16<Bf16>(float x) {
  return to_bf16(x);
}
template <>
uint32_t to_16<Half>(float x) {  // of what the kernels make: whole numbers, and fp8 times 2^8
  if (x == 0.0f) return std::signbit(x) ? 0x8000u : 0u;
  int exponent;
  const float fraction = std::frexp(std::fabs(x), &exponent);
  const int bits = static_cast<int>(std::ldexp(fraction, 11));
  if (std::ldexp(fraction, 11) != bits || exponent < -13 || exponent > 16) std::abort();
  return (std::signbit(x) ? 0x8000u : 0u) | static_cast<uint32_t>(exponent + 14) << 10 | (bits & 1023);
}

inline uint4 load_once(const char* address, bool there) {
  return there ? *reinterpret_cast<const uint4*>(address) : uint4{0, 0, 0, 0};
}

inline void prefetch(const void* address) { (void)*static_cast<const volatile char*>(address); }

template <class T>
uint32_t fma_2(uint32_t a, uint32_t b, uint32_t c) {
  auto one = [](uint32_t x, uint32_t y, uint32_t z) {
    return to_16<T>(static_cast<float>(static_cast<double>(from_16<T>(x)) * from_16<T>(y) + from_16<T>(z)));
  };
  return one(a, b, c) | one(a >> 16, b >> 16, c >> 16) << 16;
}

template <class T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using cuda_host::meet;
  using cuda_host::Meeting;
  uint64_t first[32], second[32], both[32];
  std::memcpy(first, meet(Meeting::kShuffle, static_cast<uint64_t>(a[1]) << 32 | a[0]), sizeof(first));
  std::memcpy(second, meet(Meeting::kShuffle, static_cast<uint64_t>(a[3]) << 32 | a[2]), sizeof(second));
  std::memcpy(both, meet(Meeting::kShuffle, static_cast<uint64_t>(b1) << 32 | b0), sizeof(both));
  auto part = [](uint64_t two, int high, int k) {  // number k of one of two registers
    return static_cast<double>(from_16<T>(static_cast<uint32_t>(two >> (32 * high + 16 * k))));
  };
  const int lane = static_cast<int>(cuda_host::lane());
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2, below = i / 2;
    double total = sum[i];
    for (int t = 0; t < 4; ++t)
      for (int k = 0; k < 2; ++k)
        total += part(first[row * 4 + t], below, k) * part(both[column * 4 + t], 0, k) +
                 part(second[row * 4 + t], below, k) * part(both[column * 4 + t], 1, k);
    sum[i] = static_cast<float>(total);
  }
}

}  // namespace specdec::head

#include "head_merge.cuh"
#include "head_scan.cuh"

using namespace specdec::head;

namespace {

// Memory that nobody has written holds this: a NaN in every format.
constexpr int kPoison = 0xFF;

using cuda_host::Memory;
Memory allocate(int64_t bytes) { return cuda_host::allocate(bytes, kPoison); }

struct Call {
  const Launch& launch;
  Memory shared;
  int block;  // which of them runs
};

template <class F>
void scan_block(void* argument, int) {
  const Call& call = *static_cast<Call*>(argument);
  scan<F>(call.launch, call.block, call.shared.get());
}

void merge_block(void* argument, int) {
  const Call& call = *static_cast<Call*>(argument);
  merge(call.launch, call.block, call.shared.get());
}

void (*kernel_of(const Launch& launch))(void*, int) {
  const bool half = launch.hidden_type == DType::kHalf;
  switch (launch.format) {
    case Format::kFloat:
      return scan_block<Float>;
    case Format::kBf16:
      return scan_block<Plain<Bf16, Format::kBf16>>;
    case Format::kHalf:
      return scan_block<Plain<Half, Format::kHalf>>;
    case Format::kInt8:
      return half ? scan_block<Int8<Half>> : scan_block<Int8<Bf16>>;
    case Format::kFp8:
      return half ? scan_block<Fp8<Half>> : scan_block<Fp8<Bf16>>;
    default:
      return half ? scan_block<Int4<Half>> : scan_block<Int4<Bf16>>;
  }
}

}  // namespace

// Shared memory of a multiprocessor and of one of its thread blocks.
struct Machine {
  int64_t of_multiprocessor, of_block;
  int32_t blocks;
};

// `arguments` are complete but for how the work is shared out. Null, or what went wrong.
extern "C" const char* head_on_host(const Launch* arguments, const Machine* machine) {
  for (int64_t first = 0; first < arguments->batch; first += kMostRequests) {
    Launch launch =
        part_of(*arguments, first, std::min<int>(arguments->batch - static_cast<int>(first), kMostRequests));
    launch.width = width_of(launch);
    if (!fit(launch, machine->of_multiprocessor, machine->of_block)) return "no room in shared memory";
    launch.blocks = std::max(machine->blocks, launch.batch);
    const Memory scratch = allocate(lay_out_scratch(launch, nullptr));
    lay_out_scratch(launch, scratch.get());
    // Thread blocks do not wait for each other, so they may come one after the other, the last one first.
    for (int block = launch.blocks; block-- > 0;) {
      Call call{launch, allocate(launch.shared.end), block};
      if (const char* failure = cuda_host::run(1, launch.threads(), kernel_of(launch), &call)) return failure;
    }
    for (int request = 0; request < launch.batch; ++request) {
      Call call{launch, allocate(merge_bytes(launch)), request};
      if (const char* failure = cuda_host::run(1, kLanes, merge_block, &call)) return failure;
    }
  }
  return nullptr;
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

struct Tensor {
  int64_t field, bytes;  // where its address stands in the Launch
  Memory memory;
  char* data;
};

}  // namespace

// The file: how many tensors, and of each where its address stands in the Launch, how far that is past a multiple of
// 16, its bytes; the Machine; the Launch. Integers are int64.
int main(int, char** argv) {
  std::FILE* file = std::fopen(argv[1], "rb");
  if (file == nullptr) return 2;
  std::vector<Tensor> tensors;
  for (int64_t left = read<int64_t>(file); left > 0; --left) {
    const auto field = read<int64_t>(file), skew = read<int64_t>(file), bytes = read<int64_t>(file);
    Memory memory = allocate(skew + bytes);
    char* data = memory.get() + skew;
    if (std::fread(data, 1, static_cast<size_t>(bytes), file) != static_cast<size_t>(bytes)) return 2;
    tensors.push_back({field, bytes, std::move(memory), data});
  }
  const auto machine = read<Machine>(file);
  auto launch = read<Launch>(file);
  std::fclose(file);
  for (const Tensor& tensor : tensors)
    std::memcpy(reinterpret_cast<char*>(&launch) + tensor.field, &tensor.data, sizeof(tensor.data));
  if (const char* failure = head_on_host(&launch, &machine)) {
    std::fprintf(stderr, "%s\n", failure);
    return 1;
  }
  file = std::fopen(argv[2], "wb");
  if (file == nullptr) return 2;
  for (const Tensor& tensor : tensors) std::fwrite(tensor.data, 1, static_cast<size_t>(tensor.bytes), file);
  return std::fclose(file) == 0 ? 0 : 2;
}

#endif
