// The three sweeps over the logits of a chunk, written once for every instruction set; rows.h says what each computes.
#pragma once
#include <cmath>

#include "blocks.h"

#if defined(__x86_64__) && defined(__GLIBC__)
// The exp and log of glibc before 2.29, so that the library also runs there (manylinux_2_28). They differ in errno alone.
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");
#endif

namespace {

using kd::Divergence;
using kd::Stats;
using kd::Sums;

// A divergence beyond this met an entry that one model masks and the other does not: it is infinite.
constexpr float kInfinite = 1e12f;

// The z of an entry as callers see it.
inline float unmasked(float z) { return z <= kMasked ? -INFINITY : z; }

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- sweep 1: statistics and exact top-k ----------------------------------------------------------------------

// The k best (value, index) pairs so far, best first. Offers come by ascending index: of equal values the first stays ahead.
struct TopK {
  int64_t k, size = 0;
  float* values;
  int64_t* indices;

  float threshold() const { return size < k ? -INFINITY : values[k - 1]; }
  void offer(float value, int64_t index) {
    if (!(value > threshold())) return;
    int64_t i = size < k ? size++ : k - 1;
    for (; i > 0 && value > values[i - 1]; --i) {
      values[i] = values[i - 1];
      indices[i] = indices[i - 1];
    }
    values[i] = value;
    indices[i] = index;
  }
};

// Offers the entries that are at least `floor`; v is padded to whole vectors with values that cannot win.
inline void offer_all(TopK& top, const float* v, int64_t n, int64_t first, float floor) {
  for (int64_t i = 0; i < n; i += kStep) {
    if (!any(load2(v + i) >= floor)) continue;
    for (int64_t j = i; j < min64(i + kStep, n); ++j)
      if (v[j] >= floor) top.offer(v[j], first + j);
  }
}

// The k largest entries of a row. A group is the entries of a block that share a lane; `maxima` has the maximum of each.
// The k-th largest entry is at least the k-th largest of these, so only blocks with a group at or above it are read again.
void top_of_row(const Row& row, int64_t vocab, const float* maxima, TopK top) {
  int64_t blocks = (vocab + kBlock - 1) / kBlock;
  TopK bound{top.k, 0, top.values, top.indices};       // of the groups; written over by the entries
  for (int64_t b = 0; b < blocks; ++b) offer_all(bound, maxima + b * kStep, kStep, 0, bound.threshold());
  const float floor = bound.threshold();
  Block z;
  for (int64_t b = 0; b < blocks; ++b) {
    if (!any(load2(maxima + b * kStep) >= floor)) continue;
    int64_t first = b * kBlock, n = min64(kBlock, vocab - first);
    row.read(first, n, z);
    offer_all(top, z.v, n, first, floor);
  }
  for (int64_t i = 0; i < top.size; ++i) top.values[i] = unmasked(top.values[i]);
  for (int64_t i = top.size; i < top.k; ++i) {         // fewer than k comparable entries: a row with NaN
    top.values[i] = NAN;
    top.indices[i] = i;
  }
}

template <bool Tempered>
Stats row_statistics(const Row& row, int64_t vocab, double temperature, float* maxima) {
  const float inverse = float(1 / temperature), rest = float(1 / temperature - inverse);
  float top = -INFINITY;
  double total = 0, weighted = 0, tempered = 0;        // sums of e, e * (z - top), e^(1/T), where e = exp(z - top)
  Block z;
  for (int64_t first = 0; first < vocab; first += kBlock) {
    int64_t n = min64(kBlock, vocab - first);
    row.read(first, n, z);
    vf2 best = -INFINITY;
    for (int64_t i = 0; i < n; i += kStep) best = max(best, load2(z.v + i));
    store(maxima + first / kBlock * kStep, best);
    float block_top = maximum(best);
    if (block_top > top) {
      if (total > 0) {
        double shift = double(top) - block_top, factor = std::exp(shift);
        weighted = factor * (weighted + shift * total);
        total *= factor;
        tempered *= std::exp(shift / temperature);
      }
      top = block_top;
    }
    vf2 e_sum, w_sum, t_sum;
    for (int64_t i = 0; i < n; i += kStep) {
      vf2 x = load2(z.v + i) - top;
      vf2 e = exp(x);
      e_sum += e;
      w_sum += e * x;
      if constexpr (Tempered) t_sum += exp(x * inverse + x * rest);
    }
    total += sum(e_sum);
    weighted += sum(w_sum);
    if constexpr (Tempered) tempered += sum(t_sum);
  }
  if (top <= kMasked) {                                // no entry, so no distribution: the sums alone are those of nothing
    float nothing = std::isnan(total) ? NAN : 0;       // of a NaN among masked entries, they show it
    return {NAN, NAN, NAN, NAN, nothing, nothing, NAN};
  }
  if (!Tempered) tempered = total;
  double logsum = std::log(total);
  return {top, float(logsum), float(logsum - weighted / total), float(std::log(tempered)),
          float(total), float(tempered), float(weighted / total)};
}

void statistics(Matrix x, int64_t vocab, int64_t begin, int64_t end, double temperature, Stats* stats, int64_t k,
                float* top_values, int64_t* top_indices, int64_t n_gather, const int64_t* gather_ids, float* gathered) {
  float* maxima = new float[(vocab + kBlock - 1) / kBlock * kStep];
  for (int64_t r = begin; r < end; ++r) {
    Row row(x, r);
    stats[r] = temperature == 1.0f ? row_statistics<false>(row, vocab, 1, maxima)
                                   : row_statistics<true>(row, vocab, temperature, maxima);
    top_of_row(row, vocab, maxima, TopK{k, 0, top_values + r * k, top_indices + r * k});
    for (int64_t j = 0; j < n_gather; ++j) gathered[r * n_gather + j] = unmasked(row.at(gather_ids[r * n_gather + j]));
  }
  delete[] maxima;
}

// ---- sweeps 2 and 3: divergence and gradient ------------------------------------------------------------------

// Which mixture m = mix p + (1 - mix) q is: q, p, an interior one of a JSD (its skew is 0, which saves a division), another.
enum Mixture { kNone, kStudent, kTeacher, kJsd, kInterior };

inline Mixture mixture_of(const Divergence* d) {
  if (d == nullptr) return kNone;
  if (d->mix == 0) return kStudent;
  if (d->mix == 1) return kTeacher;
  return d->skew == 0 && d->a * d->b > 0 ? kJsd : kInterior;
}

// A block's d = log q - log p, r = exp(-|d|) in [0, 1], and the larger of p and q.
struct Ratios {
  Block d, r, larger;
};

// What the divergence needs of one vector of entries.
struct Compared {
  vf2 q, p;
  vf2 log_m_p, log_q_m;     // log(m / p), log(q / m)
  vf2 q_skew, q_p;          // q * (q - p) / m, q * p / m
};

// The softmax of one model at a temperature: x = (z - max) / T, probability = exp(x) / sum. 1 / T is the sum of two floats,
// because the rounding of one would be the largest error where |x| is large.
template <bool Tempered>
struct Softmax {
  float max, inverse, rest, norm;
  double logsum;
  Softmax(const Stats& s, double temperature)
      : max(s.max), inverse(float(1 / temperature)), rest(float(1 / temperature - inverse)) {
    double total = Tempered ? s.tempered_sum : s.sum;
    norm = float(1 / total);
    logsum = std::log(total);
  }
  vf2 operator()(vf2 z) const {
    vf2 x = z - max;
    if constexpr (Tempered) x = x * inverse + x * rest;
    return x;
  }
};

// The softmaxes of both models and the mixture's weights.
template <bool Tempered>
struct Pair {
  Softmax<Tempered> q, p;
  float gap;               // log-sum of q minus that of p
  float mix, rest, least;  // rest: the weight of q; least: the smaller of the two
  Pair(const Stats& s, const Stats& t, const Divergence& divergence)
      : q(s, divergence.temperature), p(t, divergence.temperature), gap(float(q.logsum - p.logsum)), mix(divergence.mix),
        rest(1 - divergence.mix), least(mix < rest ? mix : rest) {}

  // Both softmaxes, in a pass before compare(): as one, more steps would wait for one another than a CPU looks ahead.
  void ratios(const Block& z_q, const Block& z_p, int64_t n, Ratios& out) const {
    for (int64_t i = 0; i < n; i += kStep) {
      vf2 x_q = q(load2(z_q.v + i)), x_p = p(load2(z_p.v + i));
      vf2 d = (x_q - x_p) - gap;
      mask2 teacher = negative(d);                     // the teacher's probability is the larger one
      store(out.d.v + i, d);
      store(out.r.v + i, exp(minus_abs(d)));
      store(out.larger.v + i, exp(select(teacher, x_p, x_q)) * select(teacher, p.norm, q.norm));
    }
  }

  // With m as w times the larger of p and q, w = 1 + c (r - 1), where c is the mixture's weight of the smaller one: nothing
  // overflows, and w is exactly 1 where p = q. It is never less than 1 - c (`least`), which is no difference of rounded
  // numbers: so an interior mixture never meets the log of 0, however close to an end it is.
  template <Mixture M>
  Compared compare(const Ratios& in, int64_t i) const {
    Compared o;
    vf2 d = load2(in.d.v + i), r = load2(in.r.v + i), big = load2(in.larger.v + i), small = big * r;
    mask2 teacher = negative(d);
    o.q = select(teacher, small, big);
    o.p = select(teacher, big, small);
    if constexpr (M == kStudent) {
      o.log_m_p = d;
      mask2 masked = d < -kInfinite;                   // an entry that the student masks gets no gradient
      o.q_skew = select(masked, 0, o.q - o.p);
      o.q_p = select(masked, 0, o.p);
    } else if constexpr (M == kTeacher) {
      o.log_q_m = d;
    } else {
      vf2 fall = r - 1.0f, w;
      if constexpr (M == kInterior) {
        vf2 c = select(teacher, rest, mix), least = select(teacher, mix, rest);
        w = select(r < 0.5f, least + c * r, 1.0f + c * fall);
      } else {   // 1 - mix instead of rest: the sum of 1 matters, the weights' rounding does not, as JSD is stationary in m
        w = max(least, 1.0f + select(teacher, 1.0f - mix, mix) * fall);
      }
      vf2 log_w = log(w);
      o.log_m_p = log_w + max(d, 0);
      o.log_q_m = min(d, 0) - log_w;
      if constexpr (M == kInterior) {
        vf2 q_w = o.q / w;
        o.q_skew = q_w * select(teacher, fall, -fall);
        o.q_p = select(teacher, q_w, q_w * r);
      }
    }
    return o;
  }
};

template <Mixture M, bool Tempered>
void row_divergence(const Row& student, const Row& teacher, int64_t vocab, const Stats& s, const Stats& t,
                    const Divergence& divergence, Sums& sums) {
  const Pair<Tempered> pair(s, t, divergence);
  double kl_p = 0, kl_q = 0, skew = 0, shared = 0, mass = 0;  // sums of p log(p/m), q log(q/m), q (q - p)/m, q p/m, q
  Block zs, zt;
  Ratios ratios;
  for (int64_t first = 0; first < vocab; first += kBlock) {
    int64_t n = min64(kBlock, vocab - first);
    student.read(first, n, zs);
    teacher.read(first, n, zt);
    pair.ratios(zs, zt, n, ratios);
    vf2 p_sum, q_sum, s_sum, shared_sum, mass_sum;
    for (int64_t i = 0; i < n; i += kStep) {
      Compared w = pair.template compare<M>(ratios, i);
      p_sum += w.p * w.log_m_p;
      q_sum += w.q * w.log_q_m;
      mass_sum += w.q;
      if constexpr (M == kInterior || M == kStudent) {
        s_sum += w.q_skew;
        shared_sum += w.q_p;
      }
    }
    kl_p -= sum(p_sum);
    kl_q += sum(q_sum);
    mass += sum(mass_sum);
    if constexpr (M == kInterior || M == kStudent) {
      skew += sum(s_sum);
      shared += sum(shared_sum);
    }
  }
  double total = divergence.a * kl_p + divergence.b * kl_q;
  if (std::isnan(total)) {
    sums = {NAN, NAN, NAN, NAN, NAN};                  // nor has such a row a gradient
    return;
  }
  // At m = q, sum q - sum p is not taken for 0: what is rounded leaves a gradient that sums to 0.
  sums = {total > kInfinite ? INFINITY : total, divergence.b * kl_q, skew, shared, mass};
}

template <Mixture M>
auto select_divergence(double temperature) {
  return temperature == 1 ? row_divergence<M, false> : row_divergence<M, true>;
}

void divergence(Matrix student, Matrix teacher, int64_t vocab, int64_t begin, int64_t end, const Stats* s,
                const Stats* t, Divergence divergence, Sums* sums) {
  auto row = select_divergence<kInterior>(divergence.temperature);
  switch (mixture_of(&divergence)) {
    case kStudent: row = select_divergence<kStudent>(divergence.temperature); break;
    case kTeacher: row = select_divergence<kTeacher>(divergence.temperature); break;
    case kJsd: row = select_divergence<kJsd>(divergence.temperature); break;
    default: break;
  }
  for (int64_t r = begin; r < end; ++r)
    row(Row(student, r), Row(teacher, r), vocab, s[r], t[r], divergence, sums[r]);
}

struct Coefficients {
  float divergence, entropy, softmax;
};

template <Mixture M, bool Tempered>
void row_gradient(const Row& student, const Row& teacher, int64_t vocab, const Stats& s, const Stats& t,
                  const Divergence& divergence, const Sums& sums, Coefficients c, Dtype out, int64_t n_scatter,
                  const int64_t* ids, const float* scatter) {
  const Softmax<false> softmax(s, 1);
  const Pair<Tempered> pair(s, t, divergence);
  const float c_div = c.divergence / divergence.temperature, c_skew = c_div * divergence.skew;
  // Means over the mass: divided by 1, which it is but for rounding, they would leave a gradient that does not sum to 0.
  const double center = sums.log_ratio / sums.mass;
  const float center_high = center, center_low = center - center_high;
  const float skew = sums.skew / sums.mass, shared = sums.shared / sums.mass;
  const float scale = student.m.scale, softcap = student.m.softcap;
  Block zs, zt;
  Ratios ratios;
  for (int64_t first = 0; first < vocab; first += kBlock) {
    int64_t n = min64(kBlock, vocab - first);
    student.read(first, n, zs);
    if constexpr (M != kNone) {
      teacher.read(first, n, zt);
      pair.ratios(zs, zt, n, ratios);
    }
    Block& dz = zt;                                    // the gradient takes the place of the teacher's block
    for (int64_t i = 0; i < n; i += kStep) {
      vf2 x = softmax(load2(zs.v + i));
      vf2 g = c.softmax - c.entropy * (x - s.mean);
      if constexpr (M == kNone) {
        g = exp(x) * softmax.norm * g;
      } else {
        Compared w = pair.template compare<M>(ratios, i);
        vf2 of_q;                                       // the divergence's gradient: c_div * q * of_q + q_skew's
        if constexpr (M != kStudent) of_q = c_div * (divergence.b * w.log_q_m - center_high - center_low);
        g = Tempered ? exp(x) * softmax.norm * g + w.q * of_q : w.q * (g + of_q);
        // q_skew less q times its mean, with q = (1 - mix) q_skew + q_p put in: nothing large cancels where p/m is small.
        if constexpr (M == kInterior || M == kStudent) g += c_skew * (shared * w.q_skew - skew * w.q_p);
      }
      store(dz.v + i, g);
    }
    for (int64_t j = 0; j < n_scatter; ++j)
      if (uint64_t(ids[j] - first) < uint64_t(n)) dz.v[ids[j] - first] += scatter[j];
    if (scale != 1 || softcap != 0)
      for (int64_t i = 0; i < n; i += kStep) {        // chain rule from z to x: dz/dx = scale (1 - (z / softcap)^2)
        vf2 slope = scale;
        if (softcap != 0) {
          vf2 y = load2(zs.v + i) / softcap;
          slope = slope * (1.0f - y * y);
        }
        store(dz.v + i, load2(dz.v + i) * slope);
      }
    student.write(first, n, dz, out);
  }
}

template <Mixture M>
auto select_gradient(float temperature) {
  return temperature == 1.0f ? row_gradient<M, false> : row_gradient<M, true>;
}

void gradient(Matrix student, Matrix teacher, int64_t vocab, int64_t begin, int64_t end, const Stats* s, const Stats* t,
              const Divergence* divergence, const Sums* sums, Dtype out, const float* c_divergence,
              const float* c_entropy, const float* c_softmax, int64_t n_scatter, const int64_t* ids,
              const float* scatter) {
  const Divergence none{0, 0, 0, 0, 1};
  const Sums nothing{0, 0, 0, 0, 1};
  auto row = row_gradient<kNone, false>;
  switch (mixture_of(divergence)) {
    case kStudent: row = select_gradient<kStudent>(divergence->temperature); break;
    case kTeacher: row = select_gradient<kTeacher>(divergence->temperature); break;
    case kJsd: row = select_gradient<kJsd>(divergence->temperature); break;
    case kInterior: row = select_gradient<kInterior>(divergence->temperature); break;
    default: break;
  }
  for (int64_t r = begin; r < end; ++r)
    row(Row(student, r), Row(divergence ? teacher : student, r), vocab, s[r], divergence ? t[r] : s[r],
        divergence ? *divergence : none, divergence ? sums[r] : nothing,
        {divergence ? c_divergence[r] : 0, c_entropy[r], c_softmax[r]}, out, n_scatter, ids + r * n_scatter,
        scatter + r * n_scatter);
}

}  // namespace
