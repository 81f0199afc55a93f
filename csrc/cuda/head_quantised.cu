// The head's kernels for quantised weights. Hidden vectors of fp32 are sums of two of bf16, so bf16 serves them.
#include "head_kernels.cuh"

namespace specdec::head {

ScanKernel quantised_kernel(Format format, bool half) {
  switch (format) {
    case Format::kInt8:
      return half ? scan_kernel<Int8<Half>> : scan_kernel<Int8<Bf16>>;
    case Format::kFp8:
      return half ? scan_kernel<Fp8<Half>> : scan_kernel<Fp8<Bf16>>;
    default:
      return half ? scan_kernel<Int4<Half>> : scan_kernel<Int4<Bf16>>;
  }
}

}  // namespace specdec::head
