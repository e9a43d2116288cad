// The row kernels with 16 lanes: AVX-512.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif
#define KD_LANES 16
#include "sweeps.h"

namespace kd {
extern const RowKernels avx512_kernels;
const RowKernels avx512_kernels{"avx512", statistics, divergence, gradient};
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
