// Rows of a tensor in any dtype => operands of a product (elements of fp32 or pairs of bf16, padded with zeros, in panels), and
// back.
#pragma once

#include <utility>

#include "cross_attention_tile.h"
#include "dtype.h"

namespace ldmkit::attention {

// A row's last bytes, fewer than kBelow <= 64, without a call.
template <int kBelow>
LDMKIT_INLINE void copy_rest(void* to, const void* from, int64_t bytes) {
  char* a = static_cast<char*>(to);
  const char* b = static_cast<const char*>(from);
  if constexpr (kBelow > 32) {
    if (bytes & 32) std::memcpy(a, b, 32), a += 32, b += 32;
  }
  if constexpr (kBelow > 16) {
    if (bytes & 16) std::memcpy(a, b, 16), a += 16, b += 16;
  }
  if constexpr (kBelow > 8) {
    if (bytes & 8) std::memcpy(a, b, 8), a += 8, b += 8;
  }
  if (bytes & 4) std::memcpy(a, b, 4), a += 4, b += 4;
  if (bytes & 2) std::memcpy(a, b, 2);
}

template <int W, class T>
LDMKIT_INLINE void widen_row(const void* from, int64_t width, float* to, int64_t padded) {
  const T* row = static_cast<const T*>(from);
  int64_t i = 0;
  for (; i + W <= width; i += W) store<W>(to + i, load<W>(row + i));
  for (; i < padded; i += W) {
    T rest[W] = {};
    if (i < width) copy_rest<sizeof(rest)>(rest, row + i, (width - i) * sizeof(T));
    store<W>(to + i, load<W>(rest));
  }
}

// One row of `width` numbers => fp32, zeros up to `padded`, in whole vectors.
template <int W>
LDMKIT_INLINE void widen(Dtype dtype, const void* from, int64_t width, float* to, int64_t padded) {
  switch (dtype) {
    case Dtype::f32: return widen_row<W, float>(from, width, to, padded);
    case Dtype::f16: return widen_row<W, Half>(from, width, to, padded);
    case Dtype::bf16: return widen_row<W, BFloat16>(from, width, to, padded);
    case Dtype::f64: break;
  }
}

// One row of `width` numbers => elements, zeros up to `padded`, which is a multiple of W numbers.
template <class M>
LDMKIT_INLINE void stage_row(Dtype dtype, const void* from, int64_t width, typename M::Element* to, int64_t padded) {
  constexpr int W = M::W;
  if constexpr (M::Operand::kDepth == 2) {
    auto* bytes = reinterpret_cast<char*>(to);
    const auto* row = static_cast<const char*>(from);
    int64_t i = 0;
    for (; i + 2 * W <= 2 * width; i += 2 * W) std::memcpy(bytes + i, row + i, 2 * W);
    for (; i < 4 * padded; i += 2 * W) {
      char rest[2 * W] = {};
      if (i < 2 * width) copy_rest<sizeof(rest)>(rest, row + i, 2 * width - i);
      std::memcpy(bytes + i, rest, 2 * W);
    }
  } else {
    widen<W>(dtype, from, width, to, padded);
  }
}

template <int W, class T>
LDMKIT_INLINE void narrow_row(const float* from, float factor, int64_t width, void* to) {
  T* row = static_cast<T*>(to);
  const Floats<W> factors = splat<W>(factor);
  int64_t i = 0;
  for (; i + W <= width; i += W) store<W>(row + i, load<W>(from + i) * factors);
  if (i < width) {
    T rest[W];
    store<W>(rest, load<W>(from + i) * factors);
    copy_rest<sizeof(rest)>(row + i, rest, (width - i) * sizeof(T));
  }
}

// `width` numbers of fp32, which may be read in whole vectors, times a factor => one row in dtype.
template <int W>
LDMKIT_INLINE void write_row(Dtype dtype, const float* from, float factor, int64_t width, void* to) {
  switch (dtype) {
    case Dtype::f32: return narrow_row<W, float>(from, factor, width, to);
    case Dtype::f16: return narrow_row<W, Half>(from, factor, width, to);
    case Dtype::bf16: return narrow_row<W, BFloat16>(from, factor, width, to);
    case Dtype::f64: break;
  }
}

// a0 b0 a1 b1 ...: of the first halves, and of the second.
template <int W, int... I>
LDMKIT_INLINE void zip(Floats<W> a, Floats<W> b, Floats<W>& low, Floats<W>& high, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * W)...);
  high = __builtin_shufflevector(a, b, (W / 2 + I / 2 + I % 2 * W)...);
#else
  low = __builtin_shuffle(a, b, Bits<W>{(I / 2 + I % 2 * W)...});
  high = __builtin_shuffle(a, b, Bits<W>{(W / 2 + I / 2 + I % 2 * W)...});
#endif
}

// W vectors of W elements, rows => columns: each zip of halves moves one bit of an element's place from row to column.
template <int W>
LDMKIT_INLINE void transpose(Floats<W> (&rows)[W]) {
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    Floats<W> next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      zip<W>(rows[i], rows[i + W / 2], next[2 * i], next[2 * i + 1], std::make_integer_sequence<int, W>());
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

// Staged rows (W a vector, elements) => panels (depth, columns). Elements are read in whole vectors, past `depth` too.
template <class M>
LDMKIT_INLINE void pack_transposed(const typename M::Element* rows, int64_t row_stride, int64_t vectors, int64_t depth,
                                   typename M::Element* packed) {
  constexpr int W = M::W;
  for (const Panel panel : Panels<M>{vectors}) {
    auto* to = reinterpret_cast<float*>(packed) + panel.begin * W * depth;
    for (int64_t j = 0; j < panel.vectors; ++j) {
      const auto* from = reinterpret_cast<const float*>(rows) + (panel.begin + j) * W * row_stride;
      for (int64_t k = 0; k < depth; k += W) {
        Floats<W> block[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = load<W>(from + i * row_stride + k);
        transpose<W>(block);
        float* column = to + (k * panel.vectors + j) * W;
        if (k + W <= depth) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) store<W>(column + i * panel.vectors * W, block[i]);
        } else {
          for (int i = 0; i < depth - k; ++i) store<W>(column + i * panel.vectors * W, block[i]);
        }
      }
    }
  }
}

// Staged rows (steps, W numbers a vector) => panels; a pair holds two neighbouring rows, and an odd last row's partner is 0.
template <class M>
LDMKIT_INLINE void pack_rows(const typename M::Element* rows, int64_t row_stride, int64_t steps, int64_t vectors,
                             typename M::Element* packed) {
  using Element = typename M::Element;
  constexpr int W = M::W;
  const int64_t depth = ceil_div(steps, M::Operand::kDepth);
  for (const Panel panel : Panels<M>{vectors}) {
    Element* to = packed + panel.begin * W * depth;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = panel.begin; j < panel.begin + panel.vectors; ++j, to += W) {
        if constexpr (M::Operand::kDepth == 1) {
          store<W>(to, load<W>(rows + k * row_stride + j * W));
        } else {
          const char* even = reinterpret_cast<const char*>(rows + 2 * k * row_stride) + j * W * 2;
          Bits<W> pair = load_bits<W>(even);
          if (2 * k + 1 < steps) pair |= load_bits<W>(even + row_stride * 4) << 16;
          std::memcpy(to, &pair, sizeof(pair));
        }
      }
    }
  }
}

}  // namespace ldmkit::attention
