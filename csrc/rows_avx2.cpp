// The row kernels with 8 lanes: AVX2, FMA and F16C.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define KD_LANES 8
#include "sweeps.h"

namespace kd {
extern const RowKernels avx2_kernels;
const RowKernels avx2_kernels{"avx2", statistics, divergence, gradient};
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
