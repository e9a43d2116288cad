// The torch operators over csrc/, for CPU tensors. They use the LibTorch stable ABI alone, so one binary serves every torch
// from 2.10 on. They write into tensors that they are given and know nothing of autograd (kdkernels/engine does).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>

#include "../csrc/gemm.h"
#include "../csrc/rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const char* wanted_isa() { return std::getenv("KDKERNELS_CPU_ISA"); }

template <class Kernels>
const Kernels& found(const Kernels* kernels) {
  STD_TORCH_CHECK(kernels != nullptr, "KDKERNELS_CPU_ISA: expected avx512, avx512_nobf16, avx2 or portable, as far as this "
                  "CPU has it; got '", wanted_isa(), "'");
  return *kernels;
}

const kd::RowKernels& kernels() {
  static const kd::RowKernels* chosen = kd::row_kernels(wanted_isa());
  return found(chosen);
}

std::string shape(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

void check(const char* name, const Tensor& t, ScalarType dtype, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous(), name,
                  ": expected a contiguous CPU tensor of the documented dtype");
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": expected ", rows, " rows of ",
                  columns, ", got shape ", shape(t));
}

kd::Dtype dtype_of(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return kd::Dtype::f32;
    case ScalarType::BFloat16: return kd::Dtype::bf16;
    case ScalarType::Half: return kd::Dtype::f16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

kd::Matrix matrix(const char* name, const Tensor& t, double scale, double softcap) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.stride(1) == 1 && t.size(1) > 0, name,
                  ": expected a [C, V] CPU tensor with contiguous rows, got shape ", shape(t));
  return {t.data_ptr(), t.stride(0), dtype_of(name, t.scalar_type()), float(scale), float(softcap)};
}

const kd::Stats* stats(const char* name, const Tensor& t, int64_t rows) {
  check(name, t, ScalarType::Float, rows, sizeof(kd::Stats) / sizeof(float));
  return static_cast<const kd::Stats*>(t.data_ptr());
}

kd::Sums* sums_of(const Tensor& t, int64_t rows) {
  check("sums", t, ScalarType::Double, rows, sizeof(kd::Sums) / sizeof(double));
  return static_cast<kd::Sums*>(t.data_ptr());
}

template <class T>
T* data(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }

void check_ids(const char* name, const Tensor& ids, int64_t vocab) {
  const int64_t* p = data<int64_t>(ids);
  for (int64_t i = 0, n = ids.numel(); i < n; ++i)
    STD_TORCH_CHECK(p[i] >= 0 && p[i] < vocab, name, ": expected ids in [0, ", vocab, "), got ", p[i]);
}

// Rows that a thread takes at least: waking another one takes as long as 32768 entries.
int64_t grain(int64_t vocab) { return 1 + 32768 / vocab; }

void row_statistics(Tensor logits, double scale, double softcap, double temperature, Tensor out_stats,
                    Tensor top_values, Tensor top_indices, std::optional<Tensor> gather_ids,
                    std::optional<Tensor> gathered) {
  kd::Matrix x = matrix("logits", logits, scale, softcap);
  int64_t rows = logits.size(0), vocab = logits.size(1), k = top_values.size(1), n_gather = 0;
  stats("stats", out_stats, rows);
  check("top_values", top_values, ScalarType::Float, rows, k);
  check("top_indices", top_indices, ScalarType::Long, rows, k);
  STD_TORCH_CHECK(k >= 1 && k <= vocab, "top_values: expected 1 <= k <= V = ", vocab, ", got k = ", k);
  if (gather_ids) {
    n_gather = gather_ids->size(1);
    check("gather_ids", *gather_ids, ScalarType::Long, rows, n_gather);
    STD_TORCH_CHECK(gathered, "gathered: expected a tensor beside gather_ids");
    check("gathered", *gathered, ScalarType::Float, rows, n_gather);
    check_ids("gather_ids", *gather_ids, vocab);
  }
  const kd::RowKernels& isa = kernels();               // an error in a parallel region would lose its message
  torch::stable::parallel_for(0, rows, grain(vocab), [&](int64_t begin, int64_t end) {
    isa.statistics(x, vocab, begin, end, temperature, data<kd::Stats>(out_stats), k,
                   data<float>(top_values), data<int64_t>(top_indices), n_gather,
                   gather_ids ? data<int64_t>(*gather_ids) : nullptr,
                   gathered ? data<float>(*gathered) : nullptr);
  });
}

kd::Divergence divergence_of(double a, double b, double mix, double skew, double temperature) {
  return {float(a), float(b), mix, float(skew), temperature};
}

void row_divergence(Tensor student, double s_scale, double s_softcap, Tensor s_stats, Tensor teacher, double t_scale,
                    double t_softcap, Tensor t_stats, double a, double b, double mix, double skew, double temperature,
                    Tensor sums) {
  kd::Matrix s = matrix("student", student, s_scale, s_softcap), t = matrix("teacher", teacher, t_scale, t_softcap);
  int64_t rows = student.size(0), vocab = student.size(1);
  STD_TORCH_CHECK(teacher.size(0) == rows && teacher.size(1) == vocab, "teacher: expected shape ", shape(student),
                  ", got ", shape(teacher));
  const kd::Stats *ss = stats("s_stats", s_stats, rows), *ts = stats("t_stats", t_stats, rows);
  kd::Sums* written = sums_of(sums, rows);
  kd::Divergence divergence = divergence_of(a, b, mix, skew, temperature);
  const kd::RowKernels& isa = kernels();
  torch::stable::parallel_for(0, rows, grain(vocab), [&](int64_t begin, int64_t end) {
    isa.divergence(s, t, vocab, begin, end, ss, ts, divergence, written);
  });
}

void row_gradient(Tensor student, double s_scale, double s_softcap, Tensor s_stats, std::optional<Tensor> teacher,
                  double t_scale, double t_softcap, std::optional<Tensor> t_stats, double a, double b, double mix,
                  double skew, double temperature, std::optional<Tensor> sums, Tensor coefficients, Tensor ids,
                  Tensor scatter, ScalarType out_dtype) {
  kd::Matrix s = matrix("student", student, s_scale, s_softcap), t = s;
  int64_t rows = student.size(0), vocab = student.size(1);
  const kd::Stats *ss = stats("s_stats", s_stats, rows), *ts = nullptr;
  const kd::Sums* of_divergence = nullptr;
  check("coefficients", coefficients, ScalarType::Float, 3, rows);
  int64_t n_scatter = ids.size(1);
  check("ids", ids, ScalarType::Long, rows, n_scatter);
  check("scatter", scatter, ScalarType::Float, rows, n_scatter);
  check_ids("ids", ids, vocab);
  STD_TORCH_CHECK(out_dtype != ScalarType::Float || s.dtype == kd::Dtype::f32,
                  "out_dtype: 16-bit logits have no room for a float32 gradient");
  kd::Divergence divergence = divergence_of(a, b, mix, skew, temperature);
  if (teacher) {
    t = matrix("teacher", *teacher, t_scale, t_softcap);
    STD_TORCH_CHECK(teacher->size(0) == rows && teacher->size(1) == vocab, "teacher: expected shape ", shape(student),
                    ", got ", shape(*teacher));
    STD_TORCH_CHECK(t_stats && sums, "t_stats, sums: expected with a teacher");
    ts = stats("t_stats", *t_stats, rows);
    of_divergence = sums_of(*sums, rows);
  }
  const float* c = data<float>(coefficients);
  const kd::RowKernels& isa = kernels();
  torch::stable::parallel_for(0, rows, grain(vocab), [&](int64_t begin, int64_t end) {
    isa.gradient(s, t, vocab, begin, end, ss, ts, teacher ? &divergence : nullptr, of_divergence,
                 dtype_of("out_dtype", out_dtype), c, c + rows, c + 2 * rows, n_scatter, data<int64_t>(ids),
                 data<float>(scatter));
  });
}

std::string cpu_isa() { return kernels().name; }

std::string cpu_traits() { return kd::cpu_traits(wanted_isa()); }

const kd::GemmKernels& gemm_kernels(const char* name, ScalarType dtype) {
  return found(kd::gemm_kernels(wanted_isa(), dtype_of(name, dtype)));
}

// Floating-point operations that all threads did, `steps` rounds each, in registers alone: what products are measured
// against.
double registers_only(ScalarType dtype, int64_t steps) {
  const kd::GemmKernels& isa = gemm_kernels("dtype", dtype);
  int64_t threads = torch::stable::get_num_threads();
  std::atomic<int64_t> total{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (; first < last; ++first) total += isa.registers_only(steps, 0.5f);
  });
  return double(total);
}

// out = add + a @ b
void gemm(Tensor a, Tensor b, std::optional<Tensor> add, Tensor out) {
  int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  auto check_matrix = [](const char* name, const Tensor& t, int64_t rows, int64_t columns, bool transposed) {
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name,
                    ": expected a CPU matrix [", rows, ", ", columns, "], got shape ", shape(t));
    bool contiguous = t.stride(1) == 1 || (transposed ? t.stride(0) == 1 : columns == 1);   // one number has any stride
    STD_TORCH_CHECK(contiguous, name, ": expected contiguous rows", transposed ? " or columns" : "");
  };
  check_matrix("a", a, m, k, true);
  check_matrix("b", b, k, n, true);
  check_matrix("out", out, m, n, false);
  STD_TORCH_CHECK(k > 0 && b.scalar_type() == a.scalar_type(), "b: expected a's dtype and k > 0");
  const kd::GemmKernels& isa = gemm_kernels("a", a.scalar_type());
  kd::Product p{m, n, k, a.data_ptr(), a.stride(0), a.stride(1), b.data_ptr(), b.stride(0), b.stride(1),
                nullptr, 0, kd::Dtype::f32, out.data_ptr(), out.stride(0), dtype_of("out", out.scalar_type())};
  if (add) {
    check_matrix("add", *add, m, n, false);
    p.add = add->data_ptr();
    p.add_row = add->stride(0);
    p.add_dtype = dtype_of("add", add->scalar_type());
  }
  if (m == 0 || n == 0) return;
  int64_t threads = m * n * k < (1 << 18) ? 1 : torch::stable::get_num_threads();
  kd::Tiling tiling = isa.tiling(p, threads);
  std::unique_ptr<float[], decltype(&std::free)> shared(nullptr, &std::free);
  if (tiling.shares) {
    shared.reset(static_cast<float*>(std::aligned_alloc(64, (tiling.shared * sizeof(float) + 63) / 64 * 64)));
    STD_TORCH_CHECK(shared != nullptr, "out of memory");
    torch::stable::parallel_for(0, tiling.shares, threads == 1 ? tiling.shares : 1, [&](int64_t first, int64_t last) {
      isa.share(p, first, last, shared.get());
    });
  }
  int64_t blocks = tiling.m_blocks * tiling.n_blocks;
  torch::stable::parallel_for(0, blocks, threads == 1 ? blocks : 1, [&](int64_t first, int64_t last) {
    isa.multiply(p, tiling, shared.get(), first, last);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(kdkernels, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_traits() -> str");
  m.def("registers_only(ScalarType dtype, int steps) -> float");
  m.def("gemm_(Tensor a, Tensor b, Tensor? add, Tensor(a!) out) -> ()");
  m.def("row_statistics(Tensor logits, float scale, float softcap, float temperature, Tensor(a!) stats, "
        "Tensor(b!) top_values, Tensor(c!) top_indices, Tensor? gather_ids, Tensor(d!)? gathered) -> ()");
  m.def("row_divergence(Tensor student, float s_scale, float s_softcap, Tensor s_stats, Tensor teacher, float t_scale, "
        "float t_softcap, Tensor t_stats, float a, float b, float mix, float skew, float temperature, "
        "Tensor(a!) sums) -> ()");
  m.def("row_gradient_(Tensor(a!) student, float s_scale, float s_softcap, Tensor s_stats, Tensor? teacher, "
        "float t_scale, float t_softcap, Tensor? t_stats, float a, float b, float mix, float skew, float temperature, "
        "Tensor? sums, Tensor coefficients, Tensor ids, Tensor scatter, ScalarType out_dtype) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_traits", TORCH_BOX(&cpu_traits));
  m.impl("registers_only", TORCH_BOX(&registers_only));
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("row_statistics", TORCH_BOX(&row_statistics));
  m.impl("row_divergence", TORCH_BOX(&row_divergence));
  m.impl("row_gradient_", TORCH_BOX(&row_gradient));
  m.impl("gemm_", TORCH_BOX(&gemm));
}
