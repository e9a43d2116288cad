// Products in registers of 6 x 64 sums: AVX-512 for fp32 operands, AVX512_BF16 for bf16 ones.
//
// Both multiply 32-bit words: one fp32 number, or two bf16 numbers that follow each other along k. A panel of b, 64
// columns and kDepth words deep, is packed to lie in L1 while all rows of a pass by.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "gemm.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#endif

namespace {

using kd::Dtype;
using kd::Product;
using kd::Tiling;

constexpr int64_t kPanel = 64;    // columns of b side by side: 4 vectors
constexpr int kRows = 6;          // rows of a at a time: 24 sums, 4 words of b and 1 of a make 29 of 32 registers
constexpr int64_t kDepth = 128;   // words: a packed panel takes 32 KiB
constexpr int64_t kTall = 96;     // rows of a block where a has to be packed
constexpr int64_t kWide = 32;     // panels of such a block at most: its sums stay in L2, and within a budget of memory
constexpr int64_t kCacheLine = 64;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline __mmask16 first16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
inline __mmask32 first32(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }

// ---- words ------------------------------------------------------------------------------------------------------

struct F32 {
  using Number = float;
  static constexpr int64_t kNumbers = 1;               // of k in a word
  static __m512 multiply_add(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }
  static __m512 load(const Number* p, int64_t numbers) { return _mm512_maskz_loadu_ps(first16(numbers), p); }
  // 32 columns of one row.
  static void interleave(const Number* row, const Number*, int64_t columns, float* out) {
    _mm512_store_ps(out, load(row, columns));
    _mm512_store_ps(out + 16, load(row + 16, columns - 16));
  }
};

struct Bf16 {
  using Number = uint16_t;
  static constexpr int64_t kNumbers = 2;
  static __m512 multiply_add(__m512 a, __m512 b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static __m512 load(const Number* p, int64_t numbers) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(first32(numbers), p));
  }
  // 32 columns of two rows; there may be no second one.
  static void interleave(const Number* row, const Number* next, int64_t columns, float* out) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __mmask32 mask = first32(columns);
    __m512i x = _mm512_maskz_loadu_epi16(mask, row);
    __m512i y = next ? _mm512_maskz_loadu_epi16(mask, next) : _mm512_setzero_si512();
    _mm512_store_si512(out, _mm512_permutex2var_epi16(x, low, y));
    _mm512_store_si512(out + 16, _mm512_permutex2var_epi16(x, high, y));
  }
};

// ---- packing ----------------------------------------------------------------------------------------------------

// out [words, columns rounded up to 32] from `numbers` rows of contiguous columns.
template <class T>
void pack_rows(const typename T::Number* x, int64_t row, int64_t numbers, int64_t columns, float* out,
               int64_t out_row) {
  for (int64_t k = 0; k < numbers; k += T::kNumbers, out += out_row) {
    const typename T::Number* here = x + k * row;
    const typename T::Number* next = k + 1 < numbers ? here + row : nullptr;
    for (int64_t j = 0; j < columns; j += 32) T::interleave(here + j, next ? next + j : next, columns - j, out + j);
  }
}

inline void transpose(__m512 r[16]) {
  __m512 t[16];
  auto low = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  auto high = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = low(t[i], t[i + 2]);
    r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]);
    r[i + 3] = high(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {                        // quarters of vectors
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}

// out [words, kPanel] from `columns` columns of contiguous numbers.
template <class T>
void pack_columns(const typename T::Number* x, int64_t column, int64_t numbers, int64_t columns, float* out) {
  int64_t words = ceil_div(numbers, T::kNumbers);
  for (int64_t j = 0; j < kPanel; j += 16) {
    for (int64_t w = 0; w < words; w += 16) {
      __m512 r[16];
      for (int i = 0; i < 16; ++i)
        r[i] = j + i < columns ? T::load(x + (j + i) * column + w * T::kNumbers, numbers - w * T::kNumbers)
                               : _mm512_setzero_ps();
      transpose(r);
      int64_t n = min64(16, words - w);
      for (int64_t i = 0; i < n; ++i) _mm512_store_ps(out + (w + i) * kPanel + j, r[i]);
    }
  }
}

// Rows of contiguous numbers that will be read next, to be brought into L2 a few lines at a time: all at once, they
// would stall the kernel for as long as memory takes.
struct Ahead {
  const char* data = nullptr;
  int64_t row = 0, lines = 0, rows = 0, line = 0;      // bytes from row to row, cache lines of each, rows left
  int64_t share = 0;                                   // lines at a time

  Ahead() = default;
  template <class N>
  Ahead(const N* x, int64_t stride, int64_t count, int64_t columns)
      : data((const char*)x), row(stride * int64_t(sizeof(N))), lines(ceil_div(columns * int64_t(sizeof(N)), kCacheLine)),
        rows(count) {}

  void spread(int64_t steps) { share = ceil_div(rows * lines, steps); }
  void step() {
    for (int64_t i = 0; i < share && rows > 0; ++i) {
      _mm_prefetch(data + line * kCacheLine, _MM_HINT_T1);
      if (++line < lines) continue;
      line = 0;
      data += row;
      --rows;
    }
  }
};

// ---- the kernel -------------------------------------------------------------------------------------------------

// Words of a: word (r, w) lies at data + r * row + w * column bytes.
struct View {
  const char* data;
  int64_t row, column;
};

// sums [R, kPanel] (+)= a [R, words] @ b [words, kPanel]. The products are summed before they are added to `sums`: along
// a k of 151936 words, one running sum would lose two more digits.
template <class T, int R>
inline __attribute__((always_inline)) void multiply_rows(int64_t words, View a, const float* b, float* sums,
                                                         bool fresh) {
  __m512 sum[R][4];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_setzero_ps();
  const char* low = a.data;                            // two pointers, so that every row is one addressing mode away
  const char* high = a.data + 3 * a.row;
#pragma GCC unroll 2
  for (int64_t w = 0; w < words; ++w) {
    __m512 b0 = _mm512_load_ps(b), b1 = _mm512_load_ps(b + 16), b2 = _mm512_load_ps(b + 32);
    __m512 b3 = _mm512_load_ps(b + 48);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      __m512 x = _mm512_set1_ps(*(const float*)(r < 3 ? low + r * a.row : high + (r - 3) * a.row));
      sum[r][0] = T::multiply_add(x, b0, sum[r][0]);
      sum[r][1] = T::multiply_add(x, b1, sum[r][1]);
      sum[r][2] = T::multiply_add(x, b2, sum[r][2]);
      sum[r][3] = T::multiply_add(x, b3, sum[r][3]);
    }
    low += a.column;
    high += a.column;
    b += kPanel;
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < 4; ++j) {
      float* to = sums + r * kPanel + 16 * j;
      _mm512_store_ps(to, fresh ? sum[r][j] : _mm512_add_ps(_mm512_load_ps(to), sum[r][j]));
    }
  }
}

// The same for any number of rows, while what comes next is fetched.
template <class T>
__attribute__((noinline)) void multiply_panel(int64_t rows, int64_t words, View a, const float* b, float* sums,
                                              bool fresh, Ahead (&next)[4]) {
  for (Ahead& each : next) each.spread(ceil_div(rows, kRows));
  for (; rows > 0; rows -= kRows, a.data += kRows * a.row, sums += kRows * kPanel) {
    for (Ahead& each : next) each.step();
    switch (rows) {
      case 1: multiply_rows<T, 1>(words, a, b, sums, fresh); break;
      case 2: multiply_rows<T, 2>(words, a, b, sums, fresh); break;
      case 3: multiply_rows<T, 3>(words, a, b, sums, fresh); break;
      case 4: multiply_rows<T, 4>(words, a, b, sums, fresh); break;
      case 5: multiply_rows<T, 5>(words, a, b, sums, fresh); break;
      default: multiply_rows<T, kRows>(words, a, b, sums, fresh);
    }
  }
}

// ---- what becomes of the sums -----------------------------------------------------------------------------------

template <class N>
inline __m512 load(const N* p, __mmask16 mask);
template <>
inline __m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
template <>
inline __m512 load(const uint16_t* p, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}
inline void store(float* p, __mmask16 mask, __m512 v) { _mm512_mask_storeu_ps(p, mask, v); }
inline void store(uint16_t* p, __mmask16 mask, __m512 v) {
  _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(v));
}

// out [rows, columns] = add + sums; `add` may be nullptr.
template <class Out, class Add>
void finish_as(Out* out, int64_t out_row, const Add* add, int64_t add_row, int64_t rows, int64_t columns,
               const float* sums) {
  __mmask16 mask[4];
  for (int j = 0; j < 4; ++j) mask[j] = first16(columns - 16 * j);
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m512 v = _mm512_load_ps(sums + r * kPanel + 16 * j);
      if (add) v = _mm512_add_ps(v, load(add + r * add_row + 16 * j, mask[j]));
      store(out + r * out_row + 16 * j, mask[j], v);
    }
  }
}

template <class Out>
void finish_to(const Product& p, int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums) {
  Out* out = static_cast<Out*>(p.out) + row * p.out_row + column;
  int64_t at = row * p.add_row + column;
  if (p.add && p.add_dtype == Dtype::bf16)
    finish_as(out, p.out_row, static_cast<const uint16_t*>(p.add) + at, p.add_row, rows, columns, sums);
  else
    finish_as(out, p.out_row, p.add ? static_cast<const float*>(p.add) + at : nullptr, p.add_row, rows, columns, sums);
}

// What finish() will read and write.
inline Ahead lines_of(const void* matrix, Dtype dtype, int64_t stride, int64_t row, int64_t rows, int64_t column,
                      int64_t columns) {
  int64_t at = row * stride + column;
  if (dtype == Dtype::f32) return {static_cast<const float*>(matrix) + at, stride, rows, columns};
  return {static_cast<const uint16_t*>(matrix) + at, stride, rows, columns};
}

void finish(const Product& p, int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums) {
  if (p.out_dtype == Dtype::f32)
    finish_to<float>(p, row, rows, column, columns, sums);
  else
    finish_to<uint16_t>(p, row, rows, column, columns, sums);
}

// ---- blocks -----------------------------------------------------------------------------------------------------

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats floats(int64_t n) {
  void* p = std::aligned_alloc(kCacheLine, (n / 16 + 1) * kCacheLine);   // of nothing, it may be nullptr
  if (!p) throw std::bad_alloc();
  return Floats(static_cast<float*>(p));
}

// Three shapes occur. Logits: few rows, many columns, a shallow k; blocks of one panel, and all rows of `a` stay in the
// cache. The gradient of hidden states: few rows and columns, a deep k; `a` streams by once per block, so these are as
// wide as leaves one to each thread. The gradient of weights: many rows, and `a` is transposed; blocks of kTall rows
// share a packed b.
bool tall(const Product& p) { return p.a_column != 1; }
bool deep(const Product& p) { return !tall(p) && p.k > p.n; }

template <class T>
struct Gemm {
  using Number = typename T::Number;
  static constexpr int64_t kDeep = kDepth * T::kNumbers;   // numbers of k that are packed at a time

  static int64_t panels(const Product& p) { return ceil_div(p.n, kPanel); }
  static int64_t words(const Product& p) { return ceil_div(p.k, T::kNumbers); }
  static int64_t width(const Product& p, int64_t panel) { return min64(kPanel, p.n - panel * kPanel); }
  static const Number* a(const Product& p, int64_t row, int64_t k) {
    return static_cast<const Number*>(p.a) + row * p.a_row + k * p.a_column;
  }
  static const Number* b(const Product& p, int64_t k, int64_t panel) {
    return static_cast<const Number*>(p.b) + k * p.b_row + panel * kPanel * p.b_column;
  }

  static Tiling tiling(const Product& p, int64_t threads) {
    if (tall(p)) {
      int64_t wide = min64(kWide, panels(p));
      return {kTall, wide, ceil_div(p.m, kTall), ceil_div(panels(p), wide), panels(p) * words(p) * kPanel};
    }
    int64_t wide = deep(p) ? ceil_div(panels(p), threads) : 1, n_blocks = ceil_div(panels(p), wide);
    int64_t m_block = ceil_div(p.m, ceil_div(threads, n_blocks));
    return {m_block, wide, ceil_div(p.m, m_block), n_blocks, 0};
  }

  static void pack_panel(const Product& p, int64_t panel, int64_t k, int64_t numbers, float* out) {
    if (p.b_column == 1)
      pack_rows<T>(b(p, k, panel), p.b_row, numbers, width(p, panel), out, kPanel);
    else
      pack_columns<T>(b(p, k, panel), p.b_column, numbers, width(p, panel), out);
  }

  static void share(const Product& p, int64_t first, int64_t last, float* shared) {
    for (int64_t panel = first; panel < last; ++panel)
      pack_panel(p, panel, 0, p.k, shared + panel * words(p) * kPanel);
  }

  // `rows` rows of a from `row` on, `numbers` of k from `k` on. Packed where they are transposed, and where the last
  // bf16 number has none beside it to make a word.
  static View view(const Product& p, int64_t row, int64_t rows, int64_t k, int64_t numbers, float* packed) {
    const Number* start = a(p, row, k);
    if (tall(p)) {
      pack_rows<T>(start, p.a_column, numbers, rows, packed, kTall);
      return {(const char*)packed, 4, 4 * kTall};
    }
    if (numbers % T::kNumbers == 0) return {(const char*)start, p.a_row * int64_t(sizeof(Number)), 4};
    int64_t depth = ceil_div(numbers, T::kNumbers);
    for (int64_t r = 0; r < rows; ++r) {
      packed[(r + 1) * depth - 1] = 0;
      std::memcpy(packed + r * depth, start + r * p.a_row, numbers * sizeof(Number));
    }
    return {(const char*)packed, 4 * depth, 4};
  }

  static void multiply(const Product& p, const Tiling& t, const float* shared, int64_t first, int64_t last) {
    Floats tile = floats(t.panels * t.m_block * kPanel), packed_b = floats(kDepth * kPanel);
    bool odd = p.k % T::kNumbers != 0;                     // the last numbers of a's rows are packed
    Floats packed_a = floats(tall(p) ? kTall * kDepth : odd ? t.m_block * kDepth : 0);
    for (int64_t block = first; block < last; ++block) {
      int64_t row = block % t.m_blocks * t.m_block, rows = min64(t.m_block, p.m - row);
      int64_t panel = block / t.m_blocks * t.panels, wide = min64(t.panels, panels(p) - panel);
      for (int64_t k = 0; k < p.k; k += kDeep) {
        int64_t numbers = min64(kDeep, p.k - k), depth = ceil_div(numbers, T::kNumbers);
        View rows_of_a = view(p, row, rows, k, numbers, packed_a.get());
        for (int64_t i = 0; i < wide; ++i) {
          const float* packed = shared ? shared + ((panel + i) * words(p) + k / T::kNumbers) * kPanel : packed_b.get();
          if (!shared) pack_panel(p, panel + i, k, numbers, packed_b.get());
          float* sums = tile.get() + i * rows * kPanel;
          bool last_of_k = k + kDeep >= p.k;
          int64_t column = (panel + i) * kPanel, columns = width(p, panel + i);
          Ahead next[4] = {next_of_a(p, t, block + 1 < last, row, rows, i, wide, k, numbers),
                           next_of_b(p, t, block + 1 < last, panel + i, k, numbers)};
          if (last_of_k) {
            next[2] = lines_of(p.out, p.out_dtype, p.out_row, row, rows, column, columns);
            if (p.add && p.add != p.out && p.add_row)
              next[3] = lines_of(p.add, p.add_dtype, p.add_row, row, rows, column, columns);
          }
          multiply_panel<T>(rows, depth, rows_of_a, packed, sums, k == 0, next);
          if (last_of_k) finish(p, row, rows, column, columns, sums);
        }
      }
    }
  }

  // What the block after this one, or the next part of k where that is deep, reads of b for a panel ...
  static Ahead next_of_b(const Product& p, const Tiling& t, bool more, int64_t panel, int64_t k, int64_t numbers) {
    if (deep(p)) return {b(p, min64(k + kDeep, p.k), panel), p.b_row, min64(kDeep, p.k - k - numbers), width(p, panel)};
    if (t.shared || !more || t.m_blocks > 1) return {};
    return {b(p, k, panel + 1), p.b_column, width(p, panel + 1), numbers};
  }

  // ... and of a: a share for each of the `wide` panels.
  static Ahead next_of_a(const Product& p, const Tiling& t, bool more, int64_t row, int64_t rows, int64_t i,
                         int64_t wide, int64_t k, int64_t numbers) {
    if (deep(p)) {
      int64_t from = rows * i / wide, to = rows * (i + 1) / wide, left = min64(kDeep, p.k - k - numbers);
      return {a(p, row + from, min64(k + kDeep, p.k)), p.a_row, left > 0 ? to - from : 0, left};
    }
    if (!tall(p) || !more) return {};
    int64_t from = numbers * i / wide, to = numbers * (i + 1) / wide, below = row + t.m_block;
    return {a(p, below, k + from), p.a_column, to - from, min64(t.m_block, p.m - below)};
  }
};

}  // namespace

namespace kd {
extern const GemmKernels avx512_gemm_f32, avx512_gemm_bf16;
const GemmKernels avx512_gemm_f32{Gemm<F32>::panels, Gemm<F32>::tiling, Gemm<F32>::share, Gemm<F32>::multiply};
const GemmKernels avx512_gemm_bf16{Gemm<Bf16>::panels, Gemm<Bf16>::tiling, Gemm<Bf16>::share, Gemm<Bf16>::multiply};
}  // namespace kd
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
