// tree_layout on CUDA: depths, ancestor bits and positions of a batch of trees in one launch, a thread block a tree.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "trees.cuh"

// In torch's header only under USE_CUDA; declared again so that this file also compiles against a CPU build of torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace specdec::layout {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxThreads = 1024;

__global__ void __launch_bounds__(kMaxThreads) layout_kernel(const __grid_constant__ Launch launch) {
  __shared__ Shared shared;
  lay_out(launch, blockIdx.x, shared);
}

const int32_t* int32_data(const char* name, const Tensor& tensor, int64_t size, int32_t device) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, name, ": expected the device of parents");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int, name, ": expected dtype int32");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, ": expected [", size, "]");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> tree_layout(Tensor parents, Tensor cu_nodes, int64_t max_nodes,
                                               std::optional<Tensor> prefix_lens) {
  STD_TORCH_CHECK(parents.dim() == 1 && cu_nodes.dim() == 1 && cu_nodes.size(0) >= 1 && max_nodes >= 1,
                  "tree_layout: expected parents [N], cu_nodes [B+1] and max_nodes >= 1");
  const int32_t device = parents.get_device_index();
  Launch launch{};
  launch.nodes = parents.size(0);
  launch.batch = cu_nodes.size(0) - 1;
  launch.max_nodes = max_nodes;
  launch.words = (max_nodes + 63) / 64;
  launch.parents = int32_data("parents", parents, launch.nodes, device);
  launch.parents_stride = parents.stride(0);
  launch.cu_nodes = int32_data("cu_nodes", cu_nodes, launch.batch + 1, device);
  launch.cu_nodes_stride = cu_nodes.stride(0);
  if (prefix_lens && launch.batch > 0) {
    launch.prefix_lens = int32_data("prefix_lens", *prefix_lens, launch.batch, device);
    launch.prefix_stride = prefix_lens->stride(0);
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor depths = torch::stable::new_empty(parents, {launch.nodes});
  Tensor bits = torch::stable::new_empty(parents, {launch.nodes, launch.words}, ScalarType::Long);
  Tensor positions = torch::stable::new_empty(parents, {launch.nodes});
  if (launch.nodes == 0) return {depths, bits, positions};
  launch.depths = static_cast<int32_t*>(depths.mutable_data_ptr());
  launch.bits = static_cast<int64_t*>(bits.mutable_data_ptr());
  launch.positions = static_cast<int32_t*>(positions.mutable_data_ptr());

  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "tree_layout: no current CUDA stream");
  const int64_t threads = std::min((std::min(max_nodes, launch.nodes) + 31) / 32 * 32, kMaxThreads);
  // One block more for the rows behind the last tree.
  const dim3 grid(static_cast<unsigned>(launch.batch + 1)), block(static_cast<unsigned>(threads));
  layout_kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(launch);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "tree_layout: ", cudaGetErrorString(error));
  return {depths, bits, positions};
}

}  // namespace
}  // namespace specdec::layout

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CUDA, m) { m.impl("tree_layout", TORCH_BOX(&specdec::layout::tree_layout)); }
