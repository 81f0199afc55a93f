#pragma once

// Functions that host and device share. A host compiler sees plain inline functions.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define SPECDEC_HD __host__ __device__ __forceinline__
#else
#define SPECDEC_HD inline
#endif
