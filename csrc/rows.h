// Row kernels over a chunk of logits, on raw pointers; a call is one thread's share, rows [begin, end) of the chunk.
//
// A row is the logits of one token over the vocabulary. x is what the lm_head GEMM wrote, z the model's logit:
//     z = softcap * tanh(scale * x / softcap)          (z = scale * x without soft-cap)
// Everything below is computed in fp32 from z, block by block, in registers and L1; sums over the vocabulary end in fp64.
// kdkernels/reference.py states the mathematics.
#pragma once
#include <cstdint>

namespace kd {

enum class Dtype { f32, bf16, f16 };

struct Matrix {            // logits of C tokens: row r starts at data + r * stride (in elements)
  void* data;
  int64_t stride;
  Dtype dtype;
  float scale;
  float softcap;           // 0: none
};

// Statistics of a row. max and logsum are kept apart, because their rounded sum loses the entropy at |z| ~ 1e4.
struct Stats {
  float max;               // max z
  float logsum;            // log sum exp(z - max)
  float entropy;           // nats
  float tempered;          // log sum exp((z - max) / temperature)
  // For the gradient: from a rounded log-sum of 10, every probability would be off by 4 ulp; from the entropy likewise.
  float sum, tempered_sum; // what the log-sums are the logarithms of; 0 where all entries are masked
  float mean;              // E_q[z - max]
};

// D = a KL(p || m) + b KL(q || m), m = mix p + (1 - mix) q; q student, p teacher.
// dD/dq up to a constant is  skew * (q - p) / m + b * log(q / m).
struct Divergence {
  float a, b;
  double mix;              // 1 - 1e-9 is no float
  float skew;
  double temperature;
};

// Sums over the entries of a row, at the divergence's temperature. They are those of a whole vocabulary or of a part of
// it, with the statistics of the whole in either case: the sums of all parts, added, are the sums of the whole. A row
// that has no distribution, or meets a NaN, has NaN in all of them.
struct Sums {
  double value;            // of a p log(p/m) + b q log(q/m): D. Infinite where one model masks what the other does not
  double log_ratio;        // of b q log(q/m)
  double skew;             // of q (q - p)/m
  double shared;           // of q p/m
  double mass;             // of q: 1 but for rounding. The three above over it are means, with which D's gradient is centred
};

struct RowKernels {
  const char* name;

  // Statistics, the k largest z with their indices (ties: smaller index first), and z at `gather_ids` [C, n_gather].
  void (*statistics)(Matrix x, int64_t vocab, int64_t begin, int64_t end, double temperature, Stats* stats,
                     int64_t k, float* top_values, int64_t* top_indices,
                     int64_t n_gather, const int64_t* gather_ids, float* gathered);

  void (*divergence)(Matrix student, Matrix teacher, int64_t vocab, int64_t begin, int64_t end,
                     const Stats* s, const Stats* t, Divergence divergence, Sums* sums);

  // Overwrites the student's x with d loss / d x, in `out` precision (rows keep their byte stride):
  //   divergence[r] * dD/dz + entropy[r] * dH/dz + softmax[r] * q, plus `scatter` [C, n_scatter] added at `ids`.
  // `sums` [C] are those of the whole vocabulary. divergence == nullptr: there is none, and teacher, t, sums and
  // c_divergence are unused.
  void (*gradient)(Matrix student, Matrix teacher, int64_t vocab, int64_t begin, int64_t end,
                   const Stats* s, const Stats* t, const Divergence* divergence, const Sums* sums, Dtype out,
                   const float* c_divergence, const float* c_entropy, const float* c_softmax,
                   int64_t n_scatter, const int64_t* ids, const float* scatter);
};

// The fastest set this CPU runs; `isa` ("avx512", "avx2", "portable") forces one. nullptr: this CPU or build lacks it.
const RowKernels* row_kernels(const char* isa);

}  // namespace kd
