// Products with 16 lanes: AVX-512.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#define KD_LANES 16
#define KD_ROWS 6                 // 24 sums, 4 vectors of b and 1 of a make 29 of 32 registers
#define KD_VECTORS 4
#define KD_DEPTH 128
#include "gemm_driver.h"

namespace kd {
extern const GemmKernels avx512_gemm[3];
const GemmKernels avx512_gemm[3] = {gemm_kernels_of<Wide<float>>(), gemm_kernels_of<Wide<bf16>>(),
                                    gemm_kernels_of<Wide<f16>>()};
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
