// Which instruction set's kernels this CPU gets.
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "gemm.h"
#include "rows.h"

namespace kd {

extern const RowKernels portable_kernels;
extern const GemmKernels portable_gemm[3];       // for operands of f32, bf16 and f16, as Dtype counts
#if defined(__x86_64__)
extern const RowKernels avx2_kernels;
extern const RowKernels avx512_kernels;
extern const GemmKernels avx512_bf16_gemm, avx512_gemm[3], avx2_gemm[3];
#endif

static bool wanted(const char* isa, const char* name) {
  return isa == nullptr || *isa == 0 || std::strcmp(isa, name) == 0;
}

#if defined(__x86_64__)
static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

static bool has_avx2() {
  unsigned a, b, c, d;                                 // F16C by its bit: not every compiler knows its name
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

static bool has_bf16_units(const char* isa) {
  return wanted(isa, "avx512") && has_avx512() && __builtin_cpu_supports("avx512bf16");
}

static bool cpuid_bit(unsigned subleaf, int reg, int bit) {   // of leaf 7
  unsigned r[4];
  return __get_cpuid_count(7, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[reg] >> bit & 1);
}
#endif

// Of row kernels and products alike; avx512_nobf16 is for tests on CPUs that have the units.
static const char* chosen(const char* isa) {
#if defined(__x86_64__)
  if ((wanted(isa, "avx512") || wanted(isa, "avx512_nobf16")) && has_avx512()) return "avx512";
  if (wanted(isa, "avx2") && has_avx2()) return "avx2";
#endif
  return wanted(isa, "portable") ? "portable" : "";
}

const RowKernels* row_kernels(const char* isa) {
  const std::string name = chosen(isa);
#if defined(__x86_64__)
  if (name == "avx512") return &avx512_kernels;
  if (name == "avx2") return &avx2_kernels;
#endif
  return name == "portable" ? &portable_kernels : nullptr;
}

const GemmKernels* gemm_kernels(const char* isa, Dtype operands) {
  const std::string name = chosen(isa);
  const int i = static_cast<int>(operands);
#if defined(__x86_64__)
  if (operands == Dtype::bf16 && has_bf16_units(isa)) return &avx512_bf16_gemm;
  if (name == "avx512") return &avx512_gemm[i];
  if (name == "avx2") return &avx2_gemm[i];
#endif
  return name == "portable" ? &portable_gemm[i] : nullptr;
}

std::string cpu_traits(const char* isa) {
  std::string traits = chosen(isa);
#if defined(__x86_64__)
  if (has_bf16_units(isa)) traits = "avx512_bf16";
  if (__builtin_cpu_is("intel")) traits += " intel";
  if (cpuid_bit(0, 3, 22)) traits += " amx_bf16";
  if (cpuid_bit(1, 0, 21)) traits += " amx_fp16";
#elif defined(__aarch64__)
  traits += " arm";
#endif
  return traits;
}

}  // namespace kd
