// Which instruction set's row kernels this CPU gets.
#include <cstring>

#include "rows.h"

namespace kd {

extern const RowKernels portable_kernels;
#if defined(__x86_64__)
extern const RowKernels avx2_kernels;
extern const RowKernels avx512_kernels;
#endif

const RowKernels* row_kernels(const char* isa) {
  auto wanted = [isa](const char* name) { return isa == nullptr || *isa == 0 || std::strcmp(isa, name) == 0; };
#if defined(__x86_64__)
  if (wanted("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return &avx512_kernels;
  if (wanted("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2_kernels;
#endif
  return wanted("portable") ? &portable_kernels : nullptr;
}

}  // namespace kd
