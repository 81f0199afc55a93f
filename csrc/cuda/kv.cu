// compact_kv_ on CUDA: the accepted path of every request, through the caches of all layers, in one launch.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "kv.h"

// In torch's header only under USE_CUDA; declared again so that this file also compiles against a CPU build of torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using specdec::kv::Launch;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 128;
constexpr int64_t kMaxGridZ = 65535;

// Grid: request, cache, tile of columns. __grid_constant__ lets the indexed members stay in constant memory.
__global__ void __launch_bounds__(kThreads) compact_kernel(const __grid_constant__ Launch launch) {
  const int32_t c = blockIdx.y;
  const int64_t items = specdec::kv::num_items(launch, c);
  const int64_t stride = static_cast<int64_t>(gridDim.z) * kThreads;
  for (int64_t item = static_cast<int64_t>(blockIdx.z) * kThreads + threadIdx.x; item < items; item += stride) {
    specdec::kv::move_item(launch, c, blockIdx.x, item);
  }
}

void run(const Launch& launch, cudaStream_t stream) {
  if (launch.num_caches == 0) return;
  int64_t items = 0;
  for (int32_t c = 0; c < launch.num_caches; ++c) items = std::max(items, specdec::kv::num_items(launch, c));
  const int64_t tiles = std::min((items + kThreads - 1) / kThreads, kMaxGridZ);
  if (tiles == 0) return;
  compact_kernel<<<dim3(launch.paths.batch, launch.num_caches, tiles), kThreads, 0, stream>>>(launch);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "compact_kv_: ", cudaGetErrorString(error));
}

// The public function checks more and says it better; this keeps a caller of the bare op in bounds.
const int32_t* int32_data(const char* name, const Tensor& tensor, int64_t dims, int64_t batch, int32_t device) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, name, ": expected the device of nodes");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int, name, ": expected dtype int32");
  STD_TORCH_CHECK(tensor.dim() == dims && tensor.size(0) == batch, name, ": expected ", dims,
                  " dimensions, B = ", batch);
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

void compact_kv_(std::vector<Tensor> caches, Tensor nodes, Tensor prefix_lens, std::optional<Tensor> block_table) {
  const int32_t device = nodes.get_device_index();
  const int64_t batch = nodes.size(0);
  Launch launch{};
  specdec::kv::Paths& paths = launch.paths;
  paths.nodes = int32_data("nodes", nodes, 2, batch, device);
  paths.nodes_stride = nodes.stride(0);
  paths.nodes_step = nodes.stride(1);
  paths.prefix_lens = int32_data("prefix_lens", prefix_lens, 1, batch, device);
  paths.prefix_stride = prefix_lens.stride(0);
  paths.batch = static_cast<int32_t>(batch);
  paths.steps = static_cast<int32_t>(nodes.size(1));
  if (block_table.has_value()) {
    paths.block_table = int32_data("block_table", *block_table, 2, batch, device);
    paths.table_stride = block_table->stride(0);
    paths.table_step = block_table->stride(1);
    paths.table_width = static_cast<int32_t>(block_table->size(1));
  }
  // A path of one node is a root, which does not move.
  if (batch == 0 || paths.steps < 2 || (block_table.has_value() && paths.table_width == 0)) return;

  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "compact_kv_: no current CUDA stream");
  for (const Tensor& cache : caches) {
    STD_TORCH_CHECK(cache.is_cuda() && cache.get_device_index() == device, "caches: expected the device of nodes");
    STD_TORCH_CHECK(cache.dim() == 4, "caches: expected 4 dimensions, got ", cache.dim());
    STD_TORCH_CHECK(block_table.has_value() || cache.size(0) == batch, "caches: expected B = ", batch);
    if (cache.numel() == 0) continue;
    char* data = static_cast<char*>(cache.mutable_data_ptr());
    const specdec::kv::Geometry geometry = specdec::kv::geometry_of(data, cache.sizes().data(), cache.strides().data(),
                                                                    cache.element_size(), block_table.has_value());
    if (!specdec::kv::add(launch, data, geometry)) {
      run(launch, static_cast<cudaStream_t>(stream));
      launch.num_caches = launch.num_geometries = 0;
      specdec::kv::add(launch, data, geometry);
    }
  }
  run(launch, static_cast<cudaStream_t>(stream));
}

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CUDA, m) { m.impl("compact_kv_", TORCH_BOX(&compact_kv_)); }

}  // namespace
