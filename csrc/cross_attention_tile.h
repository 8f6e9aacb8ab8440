// The products of attention on the CPU: register tiles over packed panels. Everything is inlined into its caller, and so
// compiled for the caller's instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vector.h"

namespace ldmkit::attention {

template <int W>
using Floats = typename Vec<W>::F;
template <int W>
using Bits = typename Vec<W>::U;

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

// What is named in assembly, GCC would not find in code that is compiled for its caller's target: it inserts the lanes of a
// splat one by one, spills the sums of multiply-adds, and refuses the intrinsics of AVX-512-BF16.

template <int W>
LDMKIT_INLINE Floats<W> splat(float value) {
  Floats<W> all;
  if constexpr (kAvx<W>) {
    asm("vbroadcastss %1, %0" : "=v"(all) : "v"(value));
  } else {
    for (int i = 0; i < W; ++i) all[i] = value;
  }
  return all;
}

// One element of an operand in every lane.
template <int W, class Element>
LDMKIT_INLINE Floats<W> splat_element(const Element* from) {
  Floats<W> all;
  if constexpr (kAvx<W>) {
    asm("vbroadcastss %1, %0" : "=v"(all) : "m"(*from));
  } else {
    all = splat<W>(*from);
  }
  return all;
}

// What products multiply: fp32, one step of depth per element ...
struct Single {
  using Element = float;
  static constexpr int kDepth = 1;

  template <int W>
  static LDMKIT_INLINE Floats<W> add_product(Floats<W> sum, Floats<W> a, Floats<W> b) {
    if constexpr (kAvx<W>) {
      asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
      return sum;
    } else {
      return sum + a * b;
    }
  }
};

// ... or pairs of bf16, two steps of depth per element, multiplied and summed in fp32 by one instruction of AVX-512-BF16.
struct Pair {
  using Element = uint32_t;
  static constexpr int kDepth = 2;

  template <int W>
  static LDMKIT_INLINE Floats<W> add_product(Floats<W> sum, Floats<W> a, Floats<W> b) {
    static_assert(kAvx<W>);
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
};

// An instruction set as these loops see it: vectors of W floats, tiles of kRows rows by up to kVectors vectors, as its
// registers hold them, and kTogether rows of softmax at a time.
template <int W_, int ROWS, int VECTORS, int TOGETHER, class Operand_>
struct Machine {
  static constexpr int W = W_, kRows = ROWS, kVectors = VECTORS, kTogether = TOGETHER;
  static_assert(kRows % kTogether == 0 && kRows % 2 == 0 && kVectors <= 4);
  using Operand = Operand_;
  using Element = typename Operand::Element;
};

// Columns are laid out in panels of up to kVectors vectors, as equal as can be; each is contiguous, rows in order.
struct Panel {
  int64_t begin, vectors;
};

template <class M>
struct Panels {
  int64_t vectors;

  struct Iterator {
    int64_t i, count, vectors;
    LDMKIT_INLINE Panel operator*() const {
      const int64_t begin = i * vectors / count;
      return {begin, (i + 1) * vectors / count - begin};
    }
    LDMKIT_INLINE void operator++() { ++i; }
    LDMKIT_INLINE bool operator!=(const Iterator& other) const { return i != other.i; }
  };
  LDMKIT_INLINE int64_t count() const { return ceil_div(vectors, M::kVectors); }
  LDMKIT_INLINE Iterator begin() const { return {0, count(), vectors}; }
  LDMKIT_INLINE Iterator end() const { return {count(), count(), vectors}; }
};

// Elements that are summed one after the other; more are summed by parts, which keeps rounding small.
constexpr int64_t kLongestSum = 128;

// factor a b replaces, or is added to, c (kRows, N vectors), where a is (kRows, depth), or (depth, kRows) if `kTransposed`, and
// b is one panel (depth, N vectors).
template <class M, int N, bool kTransposed>
LDMKIT_INLINE void tile(const typename M::Element* a, int64_t a_stride, const typename M::Element* b, int64_t depth,
                        float factor, bool add, float* c, int64_t c_stride) {
  constexpr int W = M::W;
  const Floats<W> factors = splat<W>(factor);
  for (int64_t k = 0; k < depth;) {
    const int64_t end = std::min(depth, k + kLongestSum);
    const bool add_here = add || k > 0;
    Floats<W> sum[M::kRows][N] = {};
    for (; k < end; ++k) {
      Floats<W> columns[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) columns[j] = load<W>(reinterpret_cast<const float*>(b + (k * N + j) * W));
#pragma GCC unroll 8
      for (int i = 0; i < M::kRows; ++i) {
        const Floats<W> row = splat_element<W>(kTransposed ? a + k * a_stride + i : a + i * a_stride + k);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) sum[i][j] = M::Operand::template add_product<W>(sum[i][j], row, columns[j]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M::kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        float* to = c + i * c_stride + j * W;
        store<W>(to, add_here ? load<W>(to) + sum[i][j] * factors : sum[i][j] * factors);
      }
    }
  }
}

// The same for all panels of b; `depth` is in elements.
template <class M, bool kTransposed = false>
LDMKIT_INLINE void product(const typename M::Element* a, int64_t a_stride, const typename M::Element* b, int64_t depth,
                           int64_t vectors, float factor, bool add, float* c, int64_t c_stride) {
  for (const Panel panel : Panels<M>{vectors}) {
    const auto* columns = b + panel.begin * M::W * depth;
    float* to = c + panel.begin * M::W;
    switch (panel.vectors) {
      case 1: M::template tile<1, kTransposed>(a, a_stride, columns, depth, factor, add, to, c_stride); break;
      case 2: M::template tile<2, kTransposed>(a, a_stride, columns, depth, factor, add, to, c_stride); break;
      case 3: M::template tile<3, kTransposed>(a, a_stride, columns, depth, factor, add, to, c_stride); break;
      case 4: M::template tile<4, kTransposed>(a, a_stride, columns, depth, factor, add, to, c_stride); break;
    }
  }
}

}  // namespace ldmkit::attention
