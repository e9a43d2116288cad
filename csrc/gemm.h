// Matrix products around the row kernels, on raw pointers: out = add + a @ b, summed in fp32 whatever the operands.
//
// Vendor libraries round sums of 16-bit operands to 16 bits on CPUs, some do not use the widest vectors of every CPU, and
// all need 8 to 100 times as long for 16-bit operands where a CPU has no units for them. These products write any dtype, and
// add to fp32 sums, at the speed of the plain product. kdkernels/compute/gemm.py decides which ones are used.
#pragma once
#include <cstdint>
#include <string>

#include "rows.h"

namespace kd {

struct Product {
  int64_t m, n, k;
  const void* a;                        // [m, k]; strides in elements, one of them 1
  int64_t a_row, a_column;
  const void* b;                        // [k, n]; likewise
  int64_t b_row, b_column;
  const void* add;                      // [m, n] with contiguous rows; nullptr: nothing to add; may be `out`
  int64_t add_row;                      // 0: every row is the same
  Dtype add_dtype;
  void* out;                            // [m, n] with contiguous rows
  int64_t out_row;
  Dtype out_dtype;
};

// Blocks of `out` of m_block rows and `panels` panels of columns, computed independently.
struct Tiling {
  int64_t m_block, panels;
  int64_t m_blocks, n_blocks;
  int64_t shares;                       // parts of what is packed once for all blocks: panels of b, or rows of a
  int64_t shared;                       // floats that these take
};

// One thread per call: parts [first, last) of what is shared, then blocks [first, last).
struct GemmKernels {
  Tiling (*tiling)(const Product&, int64_t threads);
  void (*share)(const Product&, int64_t first, int64_t last, float* shared);
  void (*multiply)(const Product&, const Tiling&, const float* shared, int64_t first, int64_t last);
  // Runs `steps` rounds of the kernel's multiply-add on registers alone; how many operations these were.
  int64_t (*registers_only)(int64_t steps, float x);
};

// The fastest for such operands; `isa` as in row_kernels. nullptr: this CPU or build lacks it.
const GemmKernels* gemm_kernels(const char* isa, Dtype operands);

// What decides whose products are faster, as names: avx512_bf16, avx512, avx2 or portable (or nothing, as above), then
// any of intel, arm, amx_bf16, amx_fp16.
std::string cpu_traits(const char* isa);

}  // namespace kd
