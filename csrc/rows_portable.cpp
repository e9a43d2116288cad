// The row kernels with 4 lanes: SSE2, NEON or whatever the compiler targets by default.
#define KD_LANES 4
#include "sweeps.h"

namespace kd {
extern const RowKernels portable_kernels;
const RowKernels portable_kernels{"portable", statistics, divergence, gradient};
}
