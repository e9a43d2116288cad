// A row of logits in blocks of kBlock entries that stay in L1: load (to fp32, scale, soft-cap), compute, store.
#pragma once
#include "pairs.h"
#include "rows.h"

namespace {

using kd::Dtype;
using kd::Matrix;

constexpr int64_t kBlock = 32 * kStep;  // each lane adds up 32 entries in fp32, then fp64 takes over: on any vector width
// What a masked entry (logit -inf) becomes: finite, so that the log-ratio of two of them is 0, not NaN. Its exp is 0.
constexpr float kMasked = -1e30f;

struct Block {
  alignas(64) float v[kBlock];
};

template <bool Capped>
vf2 transform(vf2 x, float scale, float softcap) {
  vf2 z = x * scale;
  if constexpr (Capped) z = softcap * tanh(z / softcap);
  return max(kMasked, z);                              // a NaN stays
}

template <bool Capped, class T>
void load_block(const T* x, int64_t n, float scale, float softcap, Block& out) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) store(out.v + i, transform<Capped>(load2(x + i), scale, softcap));
  if (i < n) {                                         // the vocabulary's last entries; the rest of the vector is masked
    T tail[kStep] = {};
    std::memcpy(tail, x + i, (n - i) * sizeof(T));
    store(out.v + i, transform<Capped>(load2(tail), scale, softcap));
    for (int64_t j = n; j < i + kStep; ++j) out.v[j] = kMasked;
  }
}

// One row of a Matrix, for whichever element type it has.
struct Row {
  const Matrix& m;
  char* base;
  Row(const Matrix& matrix, int64_t r)
      : m(matrix), base(static_cast<char*>(m.data) + r * m.stride * (m.dtype == Dtype::f32 ? 4 : 2)) {}

  template <class T>
  T* entries(int64_t first) const { return reinterpret_cast<T*>(base) + first; }

  void read(int64_t first, int64_t n, Block& out) const {
    switch (m.dtype) {
      case Dtype::f32: return read_as<const float>(first, n, out);
      case Dtype::bf16: return read_as<const bf16>(first, n, out);
      case Dtype::f16: return read_as<const f16>(first, n, out);
    }
  }
  template <class T>
  void read_as(int64_t first, int64_t n, Block& out) const {
    m.softcap == 0 ? load_block<false>(entries<T>(first), n, m.scale, 0, out)
                   : load_block<true>(entries<T>(first), n, m.scale, m.softcap, out);
  }
  float at(int64_t i) const {                          // z of one entry
    Block one;
    read(i, 1, one);
    return one.v[0];
  }
  // Blocks are written in ascending order, so a 16-bit gradient may overwrite fp32 logits: entry i lies at byte 2 i, and
  // the logits still to be read lie behind it.
  void write(int64_t first, int64_t n, const Block& v, Dtype out) const {
    switch (out) {
      case Dtype::f32: return store_block(entries<float>(first), n, v);
      case Dtype::bf16: return store_block(entries<bf16>(first), n, v);
      case Dtype::f16: return store_block(entries<f16>(first), n, v);
    }
  }
  template <class T>
  static void store_block(T* p, int64_t n, const Block& v) {
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) store(p + i, load2(v.v + i));
    if (i < n) {
      T tail[kStep];
      store(tail, load2(v.v + i));
      std::memcpy(p + i, tail, (n - i) * sizeof(T));
    }
  }
};

}  // namespace
