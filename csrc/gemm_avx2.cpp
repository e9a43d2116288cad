// Products with 8 lanes: AVX2 and FMA.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define KD_LANES 8
#define KD_ROWS 6                 // 12 sums, 2 vectors of b and 1 of a make 15 of 16 registers
#define KD_VECTORS 2
#define KD_DEPTH 256
#include "gemm_driver.h"

namespace kd {
extern const GemmKernels avx2_gemm[3];
const GemmKernels avx2_gemm[3] = {gemm_kernels_of<Wide<float>>(), gemm_kernels_of<Wide<bf16>>(),
                                    gemm_kernels_of<Wide<f16>>()};
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
