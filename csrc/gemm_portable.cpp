// Products with 4 lanes: SSE2, NEON or whatever the compiler targets by default.
#define KD_LANES 4
#if defined(__aarch64__)          // 32 registers
#define KD_ROWS 6
#define KD_VECTORS 4
#else                             // 16, and a product takes one before it is added
#define KD_ROWS 4
#define KD_VECTORS 2
#endif
#define KD_DEPTH 256
#include "gemm_driver.h"

namespace kd {
extern const GemmKernels portable_gemm[3];
const GemmKernels portable_gemm[3] = {gemm_kernels_of<Wide<float>>(), gemm_kernels_of<Wide<bf16>>(),
                                    gemm_kernels_of<Wide<f16>>()};
}
