// verify_chain and verify_tree on CUDA: a whole call is one kernel, in which each request is walked by a team of thread
// blocks. Nothing is read back and nothing depends on data, so a CUDA graph can hold it.
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cuda/atomic>
#include <tuple>

#include "verify_args.h"
#include "verify_walk.cuh"

// In torch's header only under USE_CUDA; declared again so that this file also compiles against a CPU build of torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace specdec::device {
namespace {

constexpr int kResident = 2;  // thread blocks of a multiprocessor, for which each thread may hold 128 registers
constexpr int kReaders = kThreads / kLanes - 2;
constexpr int kTiles = kReaders * kTile;

__global__ void __launch_bounds__(kThreads, kResident)
    verify_kernel(const __grid_constant__ Launch launch, Method method) {
  extern __shared__ __align__(16) unsigned char tiles[];
  __shared__ Shared shared;
  verify_request(launch, method, static_cast<int>(blockIdx.x), shared, tiles);
}

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "verify: ", cudaGetErrorString(error)); }

// As many thread blocks for a request as the device holds at a time, if all have work.
int team_size(const Launch& launch, int32_t device) {
  int resident = 0, multiprocessors = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, verify_kernel, kThreads, kTiles));
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const int blocks = launch.sides[kTarget].blocks() + launch.sides[kDraft].blocks();
  return std::clamp(resident * multiprocessors / launch.batch, 1, (blocks + kReaders - 1) / kReaders);
}

cudaError_t start(const Launch& launch, Method method, cudaStream_t stream) {
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.batch) * launch.team);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kTiles;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = launch.team > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, verify_kernel, launch, method);
}

void run(Launch& launch, Method method, const Tensor& like, int32_t device) {
  void* current = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &current) == 0, "verify: no current CUDA stream");
  const auto stream = static_cast<cudaStream_t>(current);
  launch.team = team_size(launch, device);
  int64_t zeroed = 0;
  const int64_t bytes = lay_out(launch, method, nullptr, &zeroed);
  const Tensor scratch = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  lay_out(launch, method, static_cast<char*>(scratch.mutable_data_ptr()), &zeroed);
  if (zeroed > 0) check(cudaMemsetAsync(scratch.mutable_data_ptr(), 0, zeroed, stream));
  cudaError_t error = start(launch, method, stream);
  if (error == cudaErrorCooperativeLaunchTooLarge) {
    // Others hold a share of the device, as under MPS. Results do not depend on the size of the teams.
    cudaGetLastError();
    launch.team = 1;
    error = start(launch, method, stream);
  }
  check(error);
}

VerifyResults verify(const Tensor& tokens, const MaybeTensor& parents, const Tensor& cu_nodes,
                     const MaybeTensor& counts, const Tensor& target_logits, const MaybeTensor& draft_logits,
                     const MaybeTensor& draft_vocab, int64_t max_nodes, int64_t max_depth, Method method,
                     const std::string& name, const Rest& rest) {
  STD_TORCH_CHECK(cu_nodes.dim() == 1 && cu_nodes.size(0) >= 1, "verify: cu_nodes: expected [B+1]");
  STD_TORCH_CHECK(target_logits.dim() == 2 && target_logits.size(1) >= 1, "verify: target_logits: expected [N, V]");
  const int64_t nodes = target_logits.size(0), vocabulary = target_logits.size(1), batch = cu_nodes.size(0) - 1;
  const int32_t device = tokens.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);

  Arguments arguments(device);
  Launch launch{};
  launch.tokens = arguments.values<int32_t>("tokens", tokens, ScalarType::Int, {nodes});
  launch.parents = arguments.values<int32_t>("parents", parents, ScalarType::Int, {nodes});
  launch.cu_nodes = arguments.values<int32_t>("cu_nodes", cu_nodes, ScalarType::Int, {batch + 1});
  launch.counts = arguments.values<int32_t>("counts", counts, ScalarType::Int, {nodes});
  launch.judge = arguments.values<bool>("judge", rest.judge, ScalarType::Bool, {nodes});
  launch.synthetic = arguments.values<float>("synthetic", rest.synthetic, ScalarType::Float, {max_depth});
  launch.seed = arguments.values<int64_t>("seed", rest.seed, ScalarType::Long, {batch});
  launch.offset = arguments.values<int64_t>("offset", rest.offset, ScalarType::Long, {batch});
  launch.accept_uniforms = arguments.values<float>("accept_uniforms", rest.accept_uniforms, ScalarType::Float, {nodes});
  launch.final_uniforms = arguments.values<float>("final_uniforms", rest.final_uniforms, ScalarType::Float, {batch});
  launch.lenience = static_cast<float>(rest.lenience);
  launch.nodes = nodes;
  launch.vocabulary = vocabulary;
  launch.batch = static_cast<int32_t>(batch);
  launch.max_nodes = static_cast<int32_t>(max_nodes);
  launch.max_depth = static_cast<int32_t>(max_depth);

  const bool greedy = method == Method::kGreedy;  // whatever the temperature
  Side& target = launch.sides[kTarget];
  arguments.fill(target, "target_logits", target_logits, nodes, vocabulary, {}, rest.allowed,
                 greedy ? MaybeTensor() : rest.params, greedy ? std::vector<double>{0.0, 0.0, 1.0, 0.0} : rest.scalars,
                 batch);
  if (rest.reflect_logits) {
    STD_TORCH_CHECK(Arguments::dtype_of("reflect_logits", *rest.reflect_logits) == target.type,
                    "verify: reflect_logits: expected the dtype of target_logits");
    target.mixed = arguments.rows("reflect_logits", *rest.reflect_logits, {nodes, vocabulary}, &target.mixed_stride);
    target.mix = static_cast<float>(rest.reflect_weight);
  }
  const bool needs_draft = method == Method::kKSeq || method == Method::kGreedyMulti;
  STD_TORCH_CHECK(!needs_draft || draft_logits || launch.synthetic, "verify: draft_logits: expected with ", name);
  const bool reads_draft =
      !launch.synthetic && method != Method::kGreedy && method != Method::kTargetOnly && method != Method::kTypical;
  if (draft_logits && reads_draft)
    arguments.fill(launch.sides[kDraft], "draft_logits", *draft_logits, nodes, vocabulary, draft_vocab,
                   rest.draft_allowed, rest.draft_params, rest.draft_scalars, batch);
  const bool random = launch.seed && launch.offset, tests = method != Method::kTypical || launch.synthetic;
  STD_TORCH_CHECK(
      (greedy && !launch.synthetic) || random || (launch.final_uniforms && (launch.accept_uniforms || !tests)),
      "verify: expected seed and offset, or both uniforms");
  STD_TORCH_CHECK(!launch.counts || random, "verify: counts: expected seed and offset beside them");

  Outputs out(tokens, batch, max_depth + 1, rest.logprobs);
  launch.out_tokens = static_cast<int32_t*>(out.tokens.mutable_data_ptr());
  launch.out_nodes = static_cast<int32_t*>(out.nodes.mutable_data_ptr());
  launch.out_number = static_cast<int32_t*>(out.number.mutable_data_ptr());
  launch.out_logprobs = rest.logprobs ? static_cast<float*>(out.logprobs.mutable_data_ptr()) : nullptr;
  if (batch > 0) run(launch, method, tokens, device);
  return {out.tokens, out.nodes, out.number, out.logprobs};
}

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CUDA, m) {
  m.impl("verify_chain", TORCH_BOX(&verify_chain_op<&verify>));
  m.impl("verify_tree", TORCH_BOX(&verify_tree_op<&verify>));
}

}  // namespace
}  // namespace specdec::device
