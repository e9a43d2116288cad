// What the row kernels compute with: two vectors at a time. The steps of an exp or log wait for one another; those of a
// second, independent vector fill the gaps.
#pragma once
#include "lanes.h"

namespace {

struct vf2 {
  vf a, b;
  vf2(vf first, vf second) : a(first), b(second) {}
  vf2(float x = 0) : a(vf{} + x), b(a) {}
};
struct mask2 {
  vi a, b;                                             // all bits of a lane or none; of negative(), perhaps its sign alone
};
constexpr int64_t kStep = 2 * kLanes;                  // entries at a time

inline vf2 operator+(vf2 x, vf2 y) { return {x.a + y.a, x.b + y.b}; }
inline vf2 operator-(vf2 x, vf2 y) { return {x.a - y.a, x.b - y.b}; }
inline vf2 operator*(vf2 x, vf2 y) { return {x.a * y.a, x.b * y.b}; }
inline vf2 operator/(vf2 x, vf2 y) { return {x.a / y.a, x.b / y.b}; }
inline vf2 operator-(vf2 x) { return {-x.a, -x.b}; }
inline void operator+=(vf2& x, vf2 y) { x = x + y; }
inline mask2 operator<(vf2 x, vf2 y) { return {x.a < y.a, x.b < y.b}; }
inline mask2 operator>=(vf2 x, vf2 y) { return {x.a >= y.a, x.b >= y.b}; }
inline vf2 max(vf2 x, vf2 y) { return {max(x.a, y.a), max(x.b, y.b)}; }
inline vf2 min(vf2 x, vf2 y) { return {min(x.a, y.a), min(x.b, y.b)}; }
inline vf2 exp(vf2 x) { return {exp(x.a), exp(x.b)}; }
inline vf2 log(vf2 x) { return {log(x.a), log(x.b)}; }
inline vf2 abs(vf2 x) { return {abs(x.a), abs(x.b)}; }
inline vf2 minus_abs(vf2 x) { return {minus_abs(x.a), minus_abs(x.b)}; }
inline float sum(vf2 x) { return sum(x.a + x.b); }
inline float maximum(vf2 x) { return maximum(max(x.a, x.b)); }
inline bool any(mask2 m) { return any(m.a | m.b); }

#if KD_LANES == 8
inline vf select(vi mask, vf yes, vf no) { return (vf)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)mask); }
inline vi negative(vf x) { return float_to_bits(x); }  // blendv looks at signs
#else
inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
inline vi negative(vf x) { return float_to_bits(x) < 0; }
#endif
inline vf2 select(mask2 m, vf2 yes, vf2 no) { return {select(m.a, yes.a, no.a), select(m.b, yes.b, no.b)}; }
inline mask2 negative(vf2 x) { return {negative(x.a), negative(x.b)}; }

template <class T>
vf2 load2(const T* p) {
  return {load(p), load(p + kLanes)};
}
template <class T>
void store(T* p, vf2 v) {
  store(p, v.a);
  store(p + kLanes, v.b);
}

inline vf2 tanh(vf2 y) {
  vf2 a = abs(y), y2 = y * y;
  vf2 p = -5.660788605e-03f;                           // (tanh(y) / y - 1) / y^2 in y^2, minimax on |y| <= 0.63
  p = p * y2 + 2.060200731e-02f;
  p = p * y2 + -5.372922989e-02f;
  p = p * y2 + 1.333132896e-01f;
  p = p * y2 + -3.333327832e-01f;
  vf2 near = y + y * (y2 * p);
  vf2 t = exp(-2.0f * a);
  vf2 far = (1.0f - t) / (1.0f + t);
  far = select(y < 0.0f, -far, far);
  return select(a < 0.625f, near, far);
}

}  // namespace
