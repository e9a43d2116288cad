// Which instruction set's kernels this CPU gets.
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "gemm.h"
#include "rows.h"

namespace kd {

extern const RowKernels portable_kernels;
#if defined(__x86_64__)
extern const RowKernels avx2_kernels;
extern const RowKernels avx512_kernels;
extern const GemmKernels avx512_gemm_f32, avx512_gemm_bf16;
#endif

static bool wanted(const char* isa, const char* name) {
  return isa == nullptr || *isa == 0 || std::strcmp(isa, name) == 0;
}

#if defined(__x86_64__)
static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

static bool has_amx_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}
#endif

const RowKernels* row_kernels(const char* isa) {
#if defined(__x86_64__)
  if (wanted(isa, "avx512") && has_avx512()) return &avx512_kernels;
  if (wanted(isa, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2_kernels;
#endif
  return wanted(isa, "portable") ? &portable_kernels : nullptr;
}

// Vendor libraries use tiles of matrices (AMX) where a CPU has them, and AVX-512 for fp32 on Intel's; elsewhere MKL
// takes half as wide vectors.
const GemmKernels* gemm_kernels(const char* isa, Dtype operands) {
#if defined(__x86_64__)
  if (!wanted(isa, "avx512") || !has_avx512() || !__builtin_cpu_supports("avx512bf16")) return nullptr;
  if (operands == Dtype::bf16 && !has_amx_bf16()) return &avx512_gemm_bf16;
  if (operands == Dtype::f32 && !__builtin_cpu_is("intel")) return &avx512_gemm_f32;
#endif
  return nullptr;
}

}  // namespace kd
