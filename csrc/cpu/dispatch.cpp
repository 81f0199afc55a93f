// Picks the tier. The build passes SPECDEC_TIERS(X), the tiers that this compiler could target, slowest first.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "tiers.h"

namespace specdec {

#define SPECDEC_EXTERN(Family, family) extern const Family##Kernels family##_kernels;
#define SPECDEC_ADDRESS(Family, family) &family##_kernels,
#define SPECDEC_TABLE(tier)                                         \
  namespace tier {                                                  \
  SPECDEC_FAMILIES(SPECDEC_EXTERN)                                  \
  const Kernels table = {#tier, SPECDEC_FAMILIES(SPECDEC_ADDRESS)}; \
  }
SPECDEC_TIERS(SPECDEC_TABLE)

namespace {

// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
bool runs(const char* tier) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(tier, "avx2") == 0) return avx2;
  if (std::strcmp(tier, "avx512") == 0) return avx512;
  // Every CPU that has the first has the second.
  if (std::strcmp(tier, "avx512bf16") == 0)
    return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
  return std::strcmp(tier, "scalar") == 0;
}

#define SPECDEC_POINTER(tier) &tier::table,
const Kernels* const kCompiled[] = {SPECDEC_TIERS(SPECDEC_POINTER)};

struct Choice {
  const Kernels* table = nullptr;
  std::string error;
};

Choice choose() {
  const char* forced = std::getenv("SPECDEC_CPU_ISA");
  if (forced == nullptr || *forced == '\0') {
    Choice best;
    for (const Kernels* table : kCompiled)
      if (runs(table->isa)) best.table = table;
    return best;
  }
  std::string names;
  for (const char* const* tier = runnable_tiers(); *tier != nullptr; ++tier)
    names += std::string(names.empty() ? "" : ", ") + *tier;
  for (const Kernels* table : kCompiled) {
    if (std::strcmp(table->isa, forced) != 0) continue;
    if (runs(forced)) return {table, ""};
    return {nullptr, std::string("SPECDEC_CPU_ISA=") + forced + ": this CPU does not run it, only " + names};
  }
  return {nullptr, std::string("SPECDEC_CPU_ISA: expected one of ") + names + ", got '" + forced + "'"};
}

}  // namespace

const char* const* runnable_tiers() {
  static const std::vector<const char*> found = [] {
    std::vector<const char*> names;
    for (const Kernels* table : kCompiled)
      if (runs(table->isa)) names.push_back(table->isa);
    names.push_back(nullptr);
    return names;
  }();
  return found.data();
}

const Kernels& kernels() {
  static const Choice choice = choose();
  if (choice.table == nullptr) throw std::runtime_error(choice.error);
  return *choice.table;
}

}  // namespace specdec
