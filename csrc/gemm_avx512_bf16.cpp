// Products of bf16 operands in pairs, two of k in a word: AVX512_BF16. Others have those of gemm_avx512.cpp.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#endif
#define KD_LANES 16
#define KD_ROWS 6
#define KD_VECTORS 4
#define KD_DEPTH 128
#include "gemm_driver.h"

namespace {

struct Pair {
  using Number = bf16;
  static constexpr int64_t kNumbers = 2;
  static constexpr int64_t kColumns = 32;
  static constexpr bool kWidens = false;

  static __mmask32 first(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }
  static vf multiply_add(vf a, vf b, vf sum) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
  static vf load_words(const bf16* p, int64_t numbers) { return (vf)_mm512_maskz_loadu_epi16(first(numbers), p); }
  // 32 columns of two rows; there may be no second one.
  static void interleave(const bf16* row, const bf16* next, int64_t columns, float* out) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __mmask32 mask = first(columns);
    __m512i x = _mm512_maskz_loadu_epi16(mask, row);
    __m512i y = next ? _mm512_maskz_loadu_epi16(mask, next) : _mm512_setzero_si512();
    _mm512_store_si512(out, _mm512_permutex2var_epi16(x, low, y));
    _mm512_store_si512(out + 16, _mm512_permutex2var_epi16(x, high, y));
  }
  template <class Out>
  static void write(Out* p, vf v) { store(p, v); }
  static void write(bf16* p, vf v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
};

}  // namespace

namespace kd {
extern const GemmKernels avx512_bf16_gemm;
const GemmKernels avx512_bf16_gemm = gemm_kernels_of<Pair>();
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
