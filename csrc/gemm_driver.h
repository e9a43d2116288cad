// Matrix products (gemm.h), written once for every instruction set. The registers hold kRows x kPanel sums.
//
// What is multiplied is 32-bit machine words: one fp32 number, or two bf16 numbers that follow each other along k where a
// CPU has units for them. Elsewhere 16-bit operands are widened to fp32 when they are packed. A panel of b, kPanel columns
// and kDepth words deep, is packed so that it stays in L1 while it is multiplied with all rows of a.
//
// Included once per translation unit, which sets the target, KD_LANES (lanes.h), KD_ROWS, KD_VECTORS and KD_DEPTH.
#pragma once
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "gemm.h"
#include "lanes.h"
#include "transpose.h"

namespace {

using kd::Dtype;
using kd::Product;
using kd::Tiling;

constexpr int64_t kPanel = KD_VECTORS * kLanes;   // columns of b side by side
constexpr int kRows = KD_ROWS;    // rows of a at a time: their sums, a panel's vectors and a word of a fill the registers
constexpr int64_t kDepth = KD_DEPTH;   // words of a packed panel
constexpr int64_t kNarrow = 64;   // columns of a block where few rows meet many columns
constexpr int64_t kShort = (1 << 16) / kDepth;   // rows of such a block at most: 256 KiB of their words stay in L2
constexpr int64_t kTall = 96;     // rows of a block where a has to be transposed
constexpr int64_t kWide = 2048;   // columns of such a block at most: its sums stay near, and within a budget of memory
constexpr int64_t kDeepColumns = 128;   // of a block at least where k is deep, so that reading a is not what takes time
constexpr int64_t kCacheLine = 64;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- words ------------------------------------------------------------------------------------------------------

inline vf broadcast(float x) { return x - vf{}; }      // adding a zero would be an addition, because of -0

// The first n numbers of a vector, zeros after them; nothing else is read.
template <class N>
inline vf load_first(const N* p, int64_t n) {
  if (n >= kLanes) return load(p);
  N some[kLanes] = {};
  if (n > 0) std::memcpy(some, p, n * sizeof(N));
  return load(some);
}

// Words of one number, widened to fp32.
template <class N>
struct Wide {
  using Number = N;
  static constexpr int64_t kNumbers = 1;               // of k in a word
  static constexpr int64_t kColumns = kLanes;          // interleaved at a time
  static constexpr bool kWidens = sizeof(N) < 4;
  static vf multiply_add(vf a, vf b, vf sum) { return sum + a * b; }
  static vf load_words(const N* p, int64_t numbers) { return load_first(p, numbers); }
  static void interleave(const N* row, const N*, int64_t columns, float* out) { store(out, load_first(row, columns)); }
  template <class Out>
  static void write(Out* p, vf v) { store(p, v); }
};

// ---- packing ----------------------------------------------------------------------------------------------------

// out [words, columns rounded up to T::kColumns] from `numbers` rows of contiguous columns.
template <class T>
void pack_rows(const typename T::Number* x, int64_t row, int64_t numbers, int64_t columns, float* out,
               int64_t out_row) {
  for (int64_t k = 0; k < numbers; k += T::kNumbers, out += out_row) {
    const typename T::Number* here = x + k * row;
    const typename T::Number* next = k + 1 < numbers ? here + row : nullptr;
    for (int64_t j = 0; j < columns; j += T::kColumns)
      T::interleave(here + j, next ? next + j : next, columns - j, out + j);
  }
}

// out [words, kPanel] from `columns` columns of contiguous numbers.
template <class T>
void pack_columns(const typename T::Number* x, int64_t column, int64_t numbers, int64_t columns, float* out) {
  int64_t words = ceil_div(numbers, T::kNumbers);
  for (int64_t j = 0; j < kPanel; j += kLanes) {
    for (int64_t w = 0; w < words; w += kLanes) {
      vf r[kLanes];
      for (int i = 0; i < kLanes; ++i)
        r[i] = j + i < columns
                   ? T::load_words(x + (j + i) * column + w * T::kNumbers, numbers - w * T::kNumbers) : vf{};
      transpose(r);
      int64_t n = min64(kLanes, words - w);
      for (int64_t i = 0; i < n; ++i) store(out + (w + i) * kPanel + j, r[i]);
    }
  }
}

// out [rows, words] from rows of contiguous numbers.
template <class T>
void widen(const typename T::Number* x, int64_t row, int64_t rows, int64_t numbers, float* out, int64_t out_row) {
  for (int64_t r = 0; r < rows; ++r, x += row, out += out_row) {
    int64_t i = 0;
    for (; i + kLanes <= numbers; i += kLanes) store(out + i, load(x + i));
    if (i == numbers) continue;
    vf last = load_first(x + i, numbers - i);
    std::memcpy(out + i, &last, (numbers - i) * sizeof(float));
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
        rows(lines > 0 ? count : 0) {}

  void spread(int64_t steps) { share = ceil_div(rows * lines, steps); }
  void step() {
    for (int64_t i = 0; i < share && rows > 0; ++i) {
      __builtin_prefetch(data + line * kCacheLine, 0, 2);
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

// sums [R, kPanel] (+)= a [R, words] @ b [words, kPanel]. The products of a panel are summed before they are added to
// `sums`: along a k of 151936, one running sum would lose two more digits.
template <class T, int R>
inline __attribute__((always_inline)) void multiply_rows(int64_t words, View a, const float* b, float* sums,
                                                         bool fresh) {
  vf sum[R][KD_VECTORS];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < KD_VECTORS; ++j) sum[r][j] = vf{};
  const char* low = a.data;                            // two pointers, so that every row is one addressing mode away
  const char* high = a.data + 3 * a.row;
#pragma GCC unroll 2
  for (int64_t w = 0; w < words; ++w) {
    vf of_b[KD_VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < KD_VECTORS; ++j) of_b[j] = load(b + j * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      vf x = broadcast(*(const float*)(r < 3 ? low + r * a.row : high + (r - 3) * a.row));
#pragma GCC unroll 4
      for (int j = 0; j < KD_VECTORS; ++j) sum[r][j] = T::multiply_add(x, of_b[j], sum[r][j]);
    }
    low += a.column;
    high += a.column;
    b += kPanel;
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < KD_VECTORS; ++j) {
      float* to = sums + r * kPanel + kLanes * j;
      store(to, fresh ? sum[r][j] : load(to) + sum[r][j]);
    }
  }
}

template <class T, int R>
inline void multiply_last_rows(int64_t rows, int64_t words, View a, const float* b, float* sums, bool fresh) {
  if (rows == R) return multiply_rows<T, R>(words, a, b, sums, fresh);
  if constexpr (R > 1) multiply_last_rows<T, R - 1>(rows, words, a, b, sums, fresh);
}

// The same for any number of rows, while what comes next is fetched.
template <class T>
__attribute__((noinline)) void multiply_panel(int64_t rows, int64_t words, View a, const float* b, float* sums,
                                              bool fresh, Ahead (&next)[4]) {
  for (Ahead& each : next) each.spread(ceil_div(rows, kRows));
  for (; rows > 0; rows -= kRows, a.data += kRows * a.row, sums += kRows * kPanel) {
    for (Ahead& each : next) each.step();
    if (rows >= kRows)
      multiply_rows<T, kRows>(words, a, b, sums, fresh);
    else
      multiply_last_rows<T, kRows - 1>(rows, words, a, b, sums, fresh);
  }
}

// ---- what becomes of the sums -----------------------------------------------------------------------------------

// out [rows, columns] = add + sums; `add` may be nullptr.
template <class T, class Out, class Add>
void finish_as(Out* out, int64_t out_row, const Add* add, int64_t add_row, int64_t rows, int64_t columns,
               const float* sums) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < KD_VECTORS; ++j) {
      int64_t at = j * kLanes, n = columns - at;
      if (n <= 0) break;
      vf v = load(sums + r * kPanel + at);
      if (add) v = v + load_first(add + r * add_row + at, n);
      if (n >= kLanes) {
        T::write(out + r * out_row + at, v);
      } else {
        Out some[kLanes];
        T::write(some, v);
        std::memcpy(out + r * out_row + at, some, n * sizeof(Out));
      }
    }
  }
}

template <class T, class Out>
void finish_to(const Product& p, int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums) {
  Out* out = static_cast<Out*>(p.out) + row * p.out_row + column;
  int64_t at = row * p.add_row + column;
  auto with = [&](auto* add) { finish_as<T>(out, p.out_row, add ? add + at : add, p.add_row, rows, columns, sums); };
  switch (p.add_dtype) {
    case Dtype::f32: return with(static_cast<const float*>(p.add));
    case Dtype::bf16: return with(static_cast<const bf16*>(p.add));
    case Dtype::f16: return with(static_cast<const f16*>(p.add));
  }
}

template <class T>
void finish(const Product& p, int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums) {
  switch (p.out_dtype) {
    case Dtype::f32: return finish_to<T, float>(p, row, rows, column, columns, sums);
    case Dtype::bf16: return finish_to<T, bf16>(p, row, rows, column, columns, sums);
    case Dtype::f16: return finish_to<T, f16>(p, row, rows, column, columns, sums);
  }
}

// What finish() will read and write.
inline Ahead lines_of(const void* matrix, Dtype dtype, int64_t stride, int64_t row, int64_t rows, int64_t column,
                      int64_t columns) {
  int64_t at = row * stride + column;
  if (dtype == Dtype::f32) return {static_cast<const float*>(matrix) + at, stride, rows, columns};
  return {static_cast<const uint16_t*>(matrix) + at, stride, rows, columns};
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

// Three shapes of products occur:
// - Logits have few rows, many columns and a shallow k. Blocks are narrow; all rows of `a` stay in the cache, and are
//   widened once if they have to be.
// - The gradient of hidden states has few rows and columns and a deep k. Every block reads all of `a` from memory, so blocks
//   are as wide as they can be with one for each thread.
// - The gradient of weights has many rows, and `a` is transposed. Blocks of kTall rows share a packed b.
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
      int64_t wide = min64(kWide / kPanel, panels(p));
      return {kTall, wide, ceil_div(p.m, kTall), ceil_div(panels(p), wide), panels(p), panels(p) * words(p) * kPanel};
    }
    int64_t least = (deep(p) ? kDeepColumns : kNarrow) / kPanel;
    int64_t wide = min64(deep(p) ? max64(least, ceil_div(panels(p), threads)) : least, panels(p));
    int64_t n_blocks = ceil_div(panels(p), wide);
    int64_t m_blocks = max64(ceil_div(threads, n_blocks), ceil_div(p.m, deep(p) ? p.m : kShort));
    int64_t m_block = ceil_div(ceil_div(p.m, m_blocks), kRows) * kRows;
    bool widened = T::kWidens && !deep(p);
    return {m_block, wide, ceil_div(p.m, m_block), n_blocks, widened ? p.m : 0, widened ? p.m * p.k : 0};
  }

  static void pack_panel(const Product& p, int64_t panel, int64_t k, int64_t numbers, float* out) {
    if (p.b_column == 1)
      pack_rows<T>(b(p, k, panel), p.b_row, numbers, width(p, panel), out, kPanel);
    else
      pack_columns<T>(b(p, k, panel), p.b_column, numbers, width(p, panel), out);
  }

  static void share(const Product& p, int64_t first, int64_t last, float* shared) {
    if (!tall(p)) return widen<T>(a(p, first, 0), p.a_row, last - first, p.k, shared + first * p.k, p.k);
    for (int64_t panel = first; panel < last; ++panel)
      pack_panel(p, panel, 0, p.k, shared + panel * words(p) * kPanel);
  }

  // `rows` rows of a from `row` on, `numbers` of k from `k` on. Packed where they are transposed or to be widened, and
  // where the last bf16 number has none beside it to make a word.
  static View view(const Product& p, int64_t row, int64_t rows, int64_t k, int64_t numbers, const float* shared,
                   float* packed) {
    const Number* start = a(p, row, k);
    if (tall(p)) {
      pack_rows<T>(start, p.a_column, numbers, rows, packed, kTall);
      return {(const char*)packed, 4, 4 * kTall};
    }
    if constexpr (T::kWidens) {
      if (shared) return {(const char*)(shared + row * p.k + k), 4 * p.k, 4};
      widen<T>(start, p.a_row, rows, numbers, packed, kDepth);
      return {(const char*)packed, 4 * kDepth, 4};
    }
    if (numbers % T::kNumbers == 0) return {(const char*)start, p.a_row * int64_t(sizeof(Number)), 4};
    int64_t depth = ceil_div(numbers, T::kNumbers);
    for (int64_t r = 0; r < rows; ++r) {
      packed[(r + 1) * depth - 1] = 0;
      std::memcpy(packed + r * depth, start + r * p.a_row, numbers * sizeof(Number));
    }
    return {(const char*)packed, 4 * depth, 4};
  }

  // Floats that view() packs at a time.
  static int64_t packed_of_a(const Product& p, const Tiling& t) {
    if (tall(p)) return kTall * kDepth;
    return (T::kWidens && deep(p)) || p.k % T::kNumbers != 0 ? t.m_block * kDepth : 0;
  }

  static void multiply(const Product& p, const Tiling& t, const float* shared, int64_t first, int64_t last) {
    Floats tile = floats(t.panels * t.m_block * kPanel), packed_b = floats(kDepth * kPanel);
    Floats packed_a = floats(packed_of_a(p, t));
    const float* shared_b = tall(p) ? shared : nullptr;
    for (int64_t block = first; block < last; ++block) {
      int64_t row = block % t.m_blocks * t.m_block, rows = min64(t.m_block, p.m - row);
      int64_t panel = block / t.m_blocks * t.panels, wide = min64(t.panels, panels(p) - panel);
      for (int64_t k = 0; k < p.k; k += kDeep) {
        int64_t numbers = min64(kDeep, p.k - k), depth = ceil_div(numbers, T::kNumbers);
        View rows_of_a = view(p, row, rows, k, numbers, shared, packed_a.get());
        for (int64_t i = 0; i < wide; ++i) {
          const float* packed =
              shared_b ? shared_b + ((panel + i) * words(p) + k / T::kNumbers) * kPanel : packed_b.get();
          if (!shared_b) pack_panel(p, panel + i, k, numbers, packed_b.get());
          float* sums = tile.get() + i * rows * kPanel;
          bool last_of_k = k + kDeep >= p.k;
          int64_t column = (panel + i) * kPanel, columns = width(p, panel + i);
          Ahead next[4] = {next_of_a(p, t, block + 1 < last, row, rows, i, wide, k, numbers),
                           next_of_b(p, t, block, last, panel + i, k, numbers)};
          if (last_of_k) {
            next[2] = lines_of(p.out, p.out_dtype, p.out_row, row, rows, column, columns);
            if (p.add && p.add != p.out && p.add_row)
              next[3] = lines_of(p.add, p.add_dtype, p.add_row, row, rows, column, columns);
          }
          multiply_panel<T>(rows, depth, rows_of_a, packed, sums, k == 0, next);
          if (last_of_k) finish<T>(p, row, rows, column, columns, sums);
        }
      }
    }
  }

  // What the block after this one, or the next part of k where that is deep, reads of b for a panel ...
  static Ahead next_of_b(const Product& p, const Tiling& t, int64_t block, int64_t last, int64_t panel, int64_t k,
                         int64_t numbers) {
    if (deep(p)) return {b(p, min64(k + kDeep, p.k), panel), p.b_row, min64(kDeep, p.k - k - numbers), width(p, panel)};
    int64_t other = panel + t.panels;
    bool changes = (block + 1) % t.m_blocks == 0;        // with the next block
    if (tall(p) || block + 1 >= last || !changes || other >= panels(p)) return {};
    return {b(p, k, other), p.b_column, width(p, other), numbers};
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

// ---- the peak ---------------------------------------------------------------------------------------------------

// Floating-point operations of `steps` rounds of multiply_add on registers alone, as many as the kernel has sums.
template <class T>
int64_t registers_only(int64_t steps, float x) {
  constexpr int kSums = 12;                            // enough for two units of five cycles
  vf sum[kSums], half = broadcast(x), one = half + half;
  for (int i = 0; i < kSums; ++i) sum[i] = half;
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sum[i] = T::multiply_add(sum[i], half, one);
  volatile float kept;
  for (int i = 0; i < kSums; ++i) kept = sum[i][0];
  (void)kept;
  return steps * kSums * kLanes * 2 * T::kNumbers;
}

template <class T>
constexpr kd::GemmKernels gemm_kernels_of() {
  return {Gemm<T>::tiling, Gemm<T>::share, Gemm<T>::multiply, registers_only<T>};
}

}  // namespace
