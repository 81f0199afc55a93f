// head_topk, head_sample and head_part on CUDA, for few requests at a time: two kernels, nothing is read back and
// nothing depends on data, so a CUDA graph can hold a call.
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "head_args.h"
#include "head_kernels.cuh"
#include "head_merge.cuh"

// In torch's header only under USE_CUDA; declared again so that this file also compiles against a CPU build of torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace specdec::head {
namespace {

__global__ void __launch_bounds__(kLanes) merge_kernel(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(16) char shared[];
  merge(launch, static_cast<int>(blockIdx.x), shared);
}

void check_cuda(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "head: ", cudaGetErrorString(error)); }

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// At most kMostRequests requests.
void run(Launch launch, const Tensor& like, cudaStream_t stream) {
  const int device = like.get_device_index();
  const int64_t of_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  const int64_t of_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  check(fit(launch, of_multiprocessor, of_block), "hidden: ", launch.dim, " columns do not fit in shared memory");
  const ScanKernel kernel = launch.format <= Format::kHalf
                                ? plain_kernel(launch.format)
                                : quantised_kernel(launch.format, launch.hidden_type == DType::kHalf);
  const auto shared = static_cast<int>(launch.shared.end);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  int resident = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, launch.threads(), shared));
  // All that the device holds at a time, if there are 8 rows for each.
  const int64_t most = static_cast<int64_t>(launch.batch) * (int64_t{launch.count} + 7) / 8;
  const int64_t held = int64_t{resident} * attribute(cudaDevAttrMultiProcessorCount, device);
  launch.blocks = static_cast<int32_t>(std::max<int64_t>(std::min(held, most), launch.batch));
  const Tensor scratch = torch::stable::new_empty(like, {lay_out_scratch(launch, nullptr)}, ScalarType::Byte);
  lay_out_scratch(launch, static_cast<char*>(scratch.mutable_data_ptr()));
  kernel<<<launch.blocks, launch.threads(), launch.shared.end, stream>>>(launch);
  check_cuda(cudaGetLastError());
  merge_kernel<<<launch.batch, kLanes, merge_bytes(launch), stream>>>(launch);
  check_cuda(cudaGetLastError());
}

void run_all(const Launch& launch, const Tensor& like) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "no current CUDA stream");
  for (int64_t first = 0; first < launch.batch; first += kMostRequests)
    run(part_of(launch, first, static_cast<int32_t>(std::min<int64_t>(launch.batch - first, kMostRequests))), like,
        static_cast<cudaStream_t>(stream));
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results head(const Given& given, bool return_logits) {
  Arguments arguments(given);
  Launch& launch = arguments.launch;
  auto make = [&](const std::vector<int64_t>& shape, ScalarType type) {
    return torch::stable::new_empty(given.hidden, shape, type);
  };
  Tensor logits = make({launch.batch, launch.k}, ScalarType::Float),
         tokens = make({launch.batch, launch.k}, ScalarType::Int);
  Tensor lse = make({launch.batch}, ScalarType::Float), entropy = make({launch.batch}, ScalarType::Float);
  Tensor all_logits = make({launch.batch, return_logits ? launch.count : 0}, ScalarType::Float);
  launch.out_logits = static_cast<float*>(logits.mutable_data_ptr());
  launch.out_tokens = static_cast<int32_t*>(tokens.mutable_data_ptr());
  launch.out_lse = static_cast<float*>(lse.mutable_data_ptr());
  launch.out_entropy = static_cast<float*>(entropy.mutable_data_ptr());
  if (return_logits) launch.all_logits = static_cast<float*>(all_logits.mutable_data_ptr());
  run_all(launch, given.hidden);
  return {logits, tokens, lse, entropy, all_logits};
}

Results head_topk(Tensor hidden, Tensor weight, int64_t k, MaybeTensor rows, MaybeTensor row_groups,
                  MaybeTensor token_ids, MaybeTensor bias, MaybeTensor scale, double temperature,
                  MaybeTensor temperatures, bool return_logits) {
  return head({hidden, weight, k, {}, {}, {}, rows, row_groups, token_ids, bias, scale, temperature, temperatures},
              return_logits);
}

Results head_sample(Tensor hidden, Tensor weight, int64_t k, Tensor seed, Tensor offset, MaybeTensor row,
                    MaybeTensor rows, MaybeTensor row_groups, MaybeTensor token_ids, MaybeTensor bias,
                    MaybeTensor scale, double temperature, MaybeTensor temperatures, bool return_logits) {
  return head(
      {hidden, weight, k, seed, offset, row, rows, row_groups, token_ids, bias, scale, temperature, temperatures},
      return_logits);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> head_part(Tensor hidden, Tensor weight, int64_t k, MaybeTensor seed,
                                                     MaybeTensor offset, MaybeTensor row, MaybeTensor rows,
                                                     MaybeTensor row_groups, MaybeTensor token_ids, MaybeTensor bias,
                                                     MaybeTensor scale, double temperature, MaybeTensor temperatures) {
  Arguments arguments(
      {hidden, weight, k, seed, offset, row, rows, row_groups, token_ids, bias, scale, temperature, temperatures});
  Launch& launch = arguments.launch;
  auto make = [&](int64_t columns, ScalarType type) {
    return torch::stable::new_empty(hidden, {launch.batch, columns}, type);
  };
  Tensor keys = make(k, ScalarType::Double), logits = make(k, ScalarType::Float), tokens = make(k, ScalarType::Int);
  Tensor sums = make(3, ScalarType::Double);
  launch.out_keys = static_cast<double*>(keys.mutable_data_ptr());
  launch.out_logits = static_cast<float*>(logits.mutable_data_ptr());
  launch.out_tokens = static_cast<int32_t*>(tokens.mutable_data_ptr());
  launch.out_sums = static_cast<Sums*>(sums.mutable_data_ptr());
  run_all(launch, hidden);
  return {keys, logits, tokens, sums};
}

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CUDA, m) {
  m.impl("head_topk", TORCH_BOX(&head_topk));
  m.impl("head_sample", TORCH_BOX(&head_sample));
  m.impl("head_part", TORCH_BOX(&head_part));
}

}  // namespace
}  // namespace specdec::head
