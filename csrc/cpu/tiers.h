// One set of kernels per instruction set ("tier"), chosen when the module is loaded.
//
// How a family joins:
//   1. <family>.h declares `struct <Family>Kernels`, function pointers that take raw pointers and numbers only;
//   2. <family>.cpp is compiled once per tier (setup.py does that for every file here that is not ops_*.cpp,
//   dispatch.cpp
//      or module.cpp). All of it lives in `namespace specdec::SPECDEC_TIER`, it ends with
//      `extern const <Family>Kernels <family>_kernels = {...};`, and it includes neither torch nor STL headers nor
//      <math.h>: of an inline function that several tiers emit, the linker keeps one copy for all, maybe AVX-512 code.
//      The same goes for templates and inline functions of our own: inside the tier's namespace they are distinct;
//   3. one line in SPECDEC_FAMILIES below;
//   4. ops_<family>.cpp, compiled once, is the torch edge and calls `specdec::kernels().<family>->...`.
#pragma once

namespace specdec {

#define SPECDEC_FAMILIES(X) \
  X(Attention, attention)   \
  X(Head, head)             \
  X(Select, select)         \
  X(Verify, verify)

#define SPECDEC_DECLARE(Family, family) struct Family##Kernels;
SPECDEC_FAMILIES(SPECDEC_DECLARE)
#undef SPECDEC_DECLARE

struct Kernels {
  const char* isa;
#define SPECDEC_MEMBER(Family, family) const Family##Kernels* family;
  SPECDEC_FAMILIES(SPECDEC_MEMBER)
#undef SPECDEC_MEMBER
};

// The tier in use: the best that this machine runs, or the one that SPECDEC_CPU_ISA names.
// Throws std::runtime_error where SPECDEC_CPU_ISA names a tier that is unknown, not compiled in or not runnable here.
const Kernels& kernels();

// The tiers that are compiled in and that this machine runs, slowest first; ends with nullptr.
const char* const* runnable_tiers();

}  // namespace specdec
