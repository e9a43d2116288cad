// SIMD vectors of KD_LANES floats and the few functions on them that the row kernels need.
// Written with the compiler's vector types, so one source serves every instruction set; included once per translation
// unit, which sets KD_LANES and the target before it. Everything has internal linkage: code built for one
// instruction set must never be merged with another's.
#pragma once
#include <cstdint>
#include <cstring>
#if KD_LANES == 16
#include <immintrin.h>
#endif

namespace {

typedef float vf __attribute__((vector_size(4 * KD_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * KD_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * KD_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * KD_LANES)));

constexpr int64_t kLanes = KD_LANES;

inline vf splat(float x) { return vf{} + x; }
inline vf bits_to_float(vi x) { return (vf)x; }   // casts between vector types keep the bits
inline vi float_to_bits(vf x) { return (vi)x; }
inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// A NaN in b survives; in a it does not (the sums carry it instead).
#if KD_LANES == 16
inline vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
inline vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#else
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }
#endif
inline vf abs(vf a) { return bits_to_float(float_to_bits(a) & 0x7fffffff); }

inline float sum(vf v) {
#if KD_LANES == 16
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}
inline float maximum(vf v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

inline bool any(vi mask) {                             // a lane of a comparison is true
#if KD_LANES == 16
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#else
  int32_t some = 0;
  for (int i = 0; i < kLanes; ++i) some |= mask[i];
  return some != 0;
#endif
}

// The narrow types: exact when read; rounded to nearest, ties to even, when written; NaN stays NaN.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline vu load_half(const void* p) {
  vh half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, vu);
}
inline void store_half(void* p, vu bits) {
  vh half = __builtin_convertvector(bits, vh);
  std::memcpy(p, &half, sizeof half);
}

inline vf load(const bf16* p) { return bits_to_float((vi)(load_half(p) << 16)); }   // the upper half of a float
inline void store(bf16* p, vf v) {
  vu bits = (vu)float_to_bits(v);
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vu quiet = (bits >> 16) | 0x40;
  store_half(p, v == v ? rounded : quiet);
}

inline vf load(const f16* p) {
  vu half = load_half(p), sign = (half & 0x8000) << 16, magnitude = (half & 0x7fff) << 13;
  vf value = bits_to_float((vi)magnitude) * 0x1p112f;  // the exponents' biases differ by 112
  vu finite = (vu)float_to_bits(value), infinite = magnitude | 0x7f800000;
  return bits_to_float((vi)(sign | ((half & 0x7c00) == 0x7c00 ? infinite : finite)));
}
inline void store(f16* p, vf v) {
  vu sign = ((vu)float_to_bits(v) >> 16) & 0x8000, a = (vu)float_to_bits(abs(v));
  vu normal = ((a + 0xfff + ((a >> 13) & 1)) >> 13) - (112 << 10);
  vu subnormal = (vu)float_to_bits(abs(v) + 0.5f) - 0x3f000000;   // an ulp of 0.5 is the step of subnormal halves
  vu large = v == v ? vu{} + 0x7c00 : vu{} + 0x7e00;
  store_half(p, sign | (a >= 0x47800000 ? large : a < 0x38800000 ? subnormal : normal));
}

// e^x for x <= 88, 0 below -104 (with 16 lanes) or -86.6; relative error below 1e-7. exp(0) is exactly 1: identical rows
// must cancel.
inline vf exp(vf x) {
  const vf magic = splat(12582912.0f);                 // 1.5 * 2^23: adding it rounds to an integer in the low bits
#if KD_LANES == 16
  x = max(splat(-110.0f), x);                          // so that it is one
#endif
  vf shifted = x * 1.44269504f + magic;
  vf n = shifted - magic;
  vf r = (x - n * 0.693145752f) - n * 1.42860677e-6f;   // ln 2 in two parts, the first exact times any n
  vf p = splat(1.395171916e-03f);                      // (e^r - 1 - r) / r^2, minimax on |r| <= ln 2 / 2
  p = p * r + 8.369598221e-03f;
  p = p * r + 4.166618726e-02f;
  p = p * r + 1.666651289e-01f;
  p = p * r + 5.000000101e-01f;
#if KD_LANES == 16
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  p = (p * r) * r + r;
  p = p + 1.0f;
  vf scaled = (vf)((vu)float_to_bits(p) + ((vu)float_to_bits(shifted) << 23));
  return x < -86.6f ? vf{} : scaled;
#endif
}

// log x for normal positive x; log(1) is exactly 0.
#if KD_LANES == 16
inline vf log(vf x) {
  vf e = (vf)_mm512_getexp_ps((__m512)(x * 1.33333337f));   // of x over its mantissa in [3/4, 3/2)
  vf f = (vf)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src) - 1.0f;
  vf p = splat(-4.631003365e-02f);                     // (log(1 + f) - f + f^2 / 2) / f^3, minimax on [-1/4, 1/2]
  p = p * f + 1.059130430e-01f;
  p = p * f + -1.318244636e-01f;
  p = p * f + 1.446458846e-01f;
  p = p * f + -1.664393842e-01f;
  p = p * f + 1.999135017e-01f;
  p = p * f + -2.500019372e-01f;
  p = p * f + 3.333344162e-01f;
  p = p * f + -0.5f;
  vf r = p * (f * f) + e * 1.42860677e-6f;
  return e * 0.693145752f + (f + r);
}
#else
inline vf log(vf x) {
  vi bits = float_to_bits(x);
  vi exponent = (bits - 0x3f3504f3) >> 23;             // mantissa in [sqrt 1/2, sqrt 2)
  vf f = bits_to_float(bits - (exponent << 23)) - 1.0f;
  vf e = __builtin_convertvector(exponent, vf);
  vf p = splat(-7.859611501e-02f);                     // (log(1 + f) - f + f^2 / 2) / f^3, minimax
  p = p * f + 1.288164749e-01f;
  p = p * f + -1.312875480e-01f;
  p = p * f + 1.418119194e-01f;
  p = p * f + -1.662455404e-01f;
  p = p * f + 2.000228627e-01f;
  p = p * f + -2.500081041e-01f;
  p = p * f + 3.333331673e-01f;
  vf f2 = f * f;
  vf r = p * (f2 * f) + e * 1.42860677e-6f;
  r = r - 0.5f * f2;
  return e * 0.693145752f + (f + r);
}
#endif

inline vf tanh(vf y) {
  vf a = abs(y), y2 = y * y;
  vf p = splat(-5.660788605e-03f);                     // (tanh(y) / y - 1) / y^2 in y^2, minimax on |y| <= 0.63
  p = p * y2 + 2.060200731e-02f;
  p = p * y2 + -5.372922989e-02f;
  p = p * y2 + 1.333132896e-01f;
  p = p * y2 + -3.333327832e-01f;
  vf near = y + y * (y2 * p);
  vf t = exp(-2.0f * a);
  vf far = (1.0f - t) / (1.0f + t);
  far = y < 0.0f ? -far : far;
  return a < 0.625f ? near : far;
}

}  // namespace
