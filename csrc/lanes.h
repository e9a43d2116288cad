// SIMD vectors of floats and the few functions on them that the kernels need.
// Written with the compiler's vector types, so one source serves every instruction set; included once per translation
// unit, which sets KD_LANES (the floats of a register) and the target before it. Everything has internal linkage: code
// built for one instruction set must never be merged with another's.
#pragma once
#include <cstdint>
#include <cstring>
#if KD_LANES > 4
#include <immintrin.h>
#endif

namespace {

typedef float vf __attribute__((vector_size(4 * KD_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * KD_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * KD_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * KD_LANES)));

constexpr int64_t kLanes = KD_LANES;

inline vi float_to_bits(vf x) { return (vi)x; }       // casts between vector types keep the bits
inline vf bits_to_float(vi x) { return (vf)x; }
inline vf abs(vf x) { return bits_to_float(float_to_bits(x) & INT32_MAX); }
inline vf minus_abs(vf x) { return bits_to_float(float_to_bits(x) | INT32_MIN); }

// A NaN in b survives; in a it does not (the sums carry it instead).
#if KD_LANES == 16
inline vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
inline vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
inline float sum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
inline float maximum(vf v) { return _mm512_reduce_max_ps((__m512)v); }
inline bool any(vi mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }
#else
#if KD_LANES == 8
inline vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
inline vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
inline bool any(vi mask) { return _mm256_movemask_ps((__m256)mask) != 0; }
#else
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }
inline bool any(vi mask) {
  int32_t some = 0;
  for (int i = 0; i < kLanes; ++i) some |= mask[i];
  return some != 0;
}
#endif
inline float sum(vf v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}
inline float maximum(vf v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}
#endif

// x + n ln 2 for an integer n. Without FMA ln 2 has two parts, the first exact times any n; with it, one rounded to
// float errs by 3e-9 of n ln 2.
inline vf add_ln2(vf x, vf n) {
#if KD_LANES == 4
  return (x + n * 0.693145752f) + n * 1.42860677e-6f;
#else
  return x + n * 0.693147182f;
#endif
}

// e^x for x <= 88, 0 below -104 (with 16 lanes) or -87.7; relative error below 1e-7 + 3e-9 |x|. exp(0) is exactly 1:
// identical rows must cancel.
inline vf exp(vf x) {
#if KD_LANES == 16
  const float magic = 12582912.0f;                     // 1.5 * 2^23: adding it rounds to an integer in the low bits
  x = max(vf{} - 110.0f, x);                           // so that it is one
#else
  const float magic = 12582912.0f + 127;               // as an exponent: its bits, shifted, are 2^n
  x = max(vf{} - 88.0f, x);                            // n = -127, whose bits are 0
#endif
  vf shifted = x * 1.44269504f + magic;
  vf n = shifted - magic;
  vf r = add_ln2(x, -n);
  vf p = vf{} + 1.395171916e-03f;                      // (e^r - 1 - r) / r^2, minimax on |r| <= ln 2 / 2
  p = p * r + 8.369598221e-03f;
  p = p * r + 4.166618726e-02f;
  p = p * r + 1.666651289e-01f;
  p = p * r + 5.000000101e-01f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if KD_LANES == 16
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (vf)((vu)shifted << 23);
#endif
}

// log x for normal positive x; log(1) is exactly 0.
inline vf log(vf x) {
#if KD_LANES == 16
  vf e = (vf)_mm512_getexp_ps((__m512)(x * 1.33333337f));   // of x over its mantissa in [3/4, 3/2)
  vf f = (vf)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src) - 1.0f;
  vf p = vf{} - 4.631003365e-02f;                      // (log(1 + f) - f) / f^2, minimax on [-1/4, 1/2]
  p = p * f + 1.059130430e-01f;
  p = p * f + -1.318244636e-01f;
  p = p * f + 1.446458846e-01f;
  p = p * f + -1.664393842e-01f;
  p = p * f + 1.999135017e-01f;
  p = p * f + -2.500019372e-01f;
  p = p * f + 3.333344162e-01f;
#else
  vi above = float_to_bits(x) - 0x3f3504f3;                     // mantissa in [sqrt 1/2, sqrt 2)
  vf e = __builtin_convertvector(above >> 23, vf);
  vf f = bits_to_float((above & 0x7fffff) + 0x3f3504f3) - 1.0f;
  vf p = vf{} - 7.859611501e-02f;                      // (log(1 + f) - f) / f^2, minimax
  p = p * f + 1.288164749e-01f;
  p = p * f + -1.312875480e-01f;
  p = p * f + 1.418119194e-01f;
  p = p * f + -1.662455404e-01f;
  p = p * f + 2.000228627e-01f;
  p = p * f + -2.500081041e-01f;
  p = p * f + 3.333331673e-01f;
#endif
  p = p * f + -0.5f;
  return add_ln2(p * (f * f) + f, e);
}

// The narrow types: exact when read; rounded to nearest, ties to even, when written; NaN stays NaN.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline vu load_half(const void* p) {
#if KD_LANES == 16
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif KD_LANES == 8
  return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  vh half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, vu);
#endif
}
inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline vf load(const bf16* p) { return (vf)(load_half(p) << 16); }   // the upper half of a float
inline vf load(const f16* p) {
#if KD_LANES == 16
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif KD_LANES == 8
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vu half = load_half(p), sign = (half & 0x8000) << 16, magnitude = (half & 0x7fff) << 13;
  vf value = (vf)magnitude * 0x1p112f;                 // the exponents' biases differ by 112
  vu infinite = magnitude | 0x7f800000;
  return (vf)(sign | ((half & 0x7c00) == 0x7c00 ? infinite : (vu)value));
#endif
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline void store_half(void* p, vu v) {                // below 65536
#if KD_LANES == 16
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v));
#elif KD_LANES == 8
  __m256i twice = _mm256_packus_epi32((__m256i)v, (__m256i)v);   // of each half, in each half
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(twice, 0x08)));
#else
  vh half = __builtin_convertvector(v, vh);
  std::memcpy(p, &half, sizeof half);
#endif
}
inline void store(bf16* p, vf v) {
  vu b = (vu)v, rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16, quiet = (b >> 16) | 0x40;
  store_half(p, v == v ? rounded : quiet);
}
inline void store(f16* p, vf v) {
#if KD_LANES == 16
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif KD_LANES == 8
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  vu sign = ((vu)v >> 16) & 0x8000, a = (vu)v & 0x7fffffff;
  vu normal = ((a + 0xfff + ((a >> 13) & 1)) >> 13) - (112 << 10);
  vu subnormal = (vu)((vf)a + 0.5f) - 0x3f000000;      // an ulp of 0.5 is the step of subnormal halves
  vu large = v == v ? vu{} + 0x7c00 : vu{} + 0x7e00;
  store_half(p, sign | (a >= 0x47800000 ? large : a < 0x38800000 ? subnormal : normal));
#endif
}

}  // namespace
