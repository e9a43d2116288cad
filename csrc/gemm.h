// Matrix products around the row kernels, on raw pointers: out = add + a @ b, summed in fp32 whatever the operands.
//
// Vendor libraries round the sum of bf16 operands to bf16 on CPUs, and not all use the widest vectors of every CPU.
// These write fp32 or bf16, and add to fp32 sums, at the speed of the plain product.
#pragma once
#include <cstdint>

#include "rows.h"

namespace kd {

struct Product {
  int64_t m, n, k;
  Dtype operands;                       // f32 or bf16
  const void* a;                        // [m, k]; strides in elements, one of them 1
  int64_t a_row, a_column;
  const void* b;                        // [k, n]; likewise
  int64_t b_row, b_column;
  const void* add;                      // [m, n] with contiguous rows; nullptr: nothing to add; may be `out`
  int64_t add_row;                      // 0: every row is the same
  Dtype add_dtype;
  void* out;                            // [m, n] with contiguous rows
  int64_t out_row;
  Dtype out_dtype;                      // f32 or bf16, as add_dtype
};

// Blocks of `out` of m_block rows and `panels` panels of columns, computed independently.
struct Tiling {
  int64_t m_block, panels;
  int64_t m_blocks, n_blocks;
  int64_t shared;                       // floats of a packed b that serves all blocks; 0: each packs what it needs
};

// One thread per call: panels [first, last) or blocks [first, last).
struct GemmKernels {
  int64_t (*panels)(const Product&);
  Tiling (*tiling)(const Product&, int64_t threads);
  void (*share)(const Product&, int64_t first, int64_t last, float* shared);
  void (*multiply)(const Product&, const Tiling&, const float* shared, int64_t first, int64_t last);
};

// nullptr where this CPU's vendor library is better, or where `isa` (as in row_kernels) forbids the instructions.
const GemmKernels* gemm_kernels(const char* isa, Dtype operands);

}  // namespace kd
