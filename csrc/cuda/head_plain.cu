// The head's kernels for weights that are not quantised.
#include "head_kernels.cuh"

namespace specdec::head {

ScanKernel plain_kernel(Format format) {
  switch (format) {
    case Format::kBf16:
      return scan_kernel<Plain<Bf16, Format::kBf16>>;
    case Format::kHalf:
      return scan_kernel<Plain<Half, Format::kHalf>>;
    default:
      return scan_kernel<Float>;
  }
}

}  // namespace specdec::head
