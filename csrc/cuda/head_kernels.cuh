// The kernels for each format. Two files compile them, so that compilers can work side by side.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "head_scan.cuh"

namespace specdec::head {

using ScanKernel = void (*)(Launch);

// 16 warps of a multiprocessor, which is all it holds of these kernels, may have 128 registers a thread.
template <class F>
__global__ void __launch_bounds__(kSlices * kGroups * kLanes) scan_kernel(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(16) char shared[];
  scan<F>(launch, static_cast<int>(blockIdx.x), shared);
}

ScanKernel plain_kernel(Format format);
ScanKernel quantised_kernel(Format format, bool half);

}  // namespace specdec::head
