// The bodies of the loops of group_norm_silu_loops.h, for any instruction set.
#pragma once

#include <algorithm>
#include <type_traits>

#include "group_norm_silu_loops.h"
#include "vector.h"

namespace ldmkit::group_norm {

struct Baseline {
  static constexpr int W = 4, kTile = 8;
  static constexpr bool kBf16 = false;
};
struct Avx2 {
  static constexpr int W = 8, kTile = 8;
  static constexpr bool kBf16 = false;
};
struct Avx512 {
  static constexpr int W = 16, kTile = 16;  // of 32 registers
  static constexpr bool kBf16 = false;
};
struct Avx512Bf16 : Avx512 {
  static constexpr bool kBf16 = true;
};

template <class Isa>
using Float = typename Vec<Isa::W>::F;

// ------------------------------------------------------------------------------------------------------------ loads and stores

// Runs are kRun elements long at least, more than a vector. body(i, skip) for the vectors of [begin, end): the last one begins
// early enough to be whole, and its first `skip` lanes had their turn.
template <class Isa, class Body>
LDMKIT_INLINE void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + Isa::W <= end; i += Isa::W) body(i, 0);
  if (i < end) body(end - Isa::W, static_cast<int>(i - end + Isa::W));
}

// The same by tiles, body(i, count, skip), of `count` vectors of [0, n).
template <class Isa, class Body>
LDMKIT_INLINE void for_each_tile(int64_t n, const Body& body) {
  constexpr int W = Isa::W;
  int64_t i = 0;
  for (; i + W * Isa::kTile <= n; i += W * Isa::kTile) body(i, Isa::kTile, 0);
  while (i < n) {
    const int64_t count = (n - i) / W;
    body(count ? i : n - W, count ? count : 1, count ? 0 : static_cast<int>(i - n + W));
    i += count ? W * count : W;
  }
}

// `otherwise` in the first `skip` lanes.
template <class Isa>
LDMKIT_INLINE Float<Isa> skipping(Float<Isa> value, int skip, Float<Isa> otherwise) {
  if (skip == 0) return value;
  typename Vec<Isa::W>::U lane;
  for (int l = 0; l < Isa::W; ++l) lane[l] = l;
  return lane < static_cast<uint32_t>(skip) ? otherwise : value;
}

// x + residual
template <class Isa, class T>
LDMKIT_INLINE Float<Isa> load_sum(const T* x, const T* residual, int64_t i) {
  const Float<Isa> value = load<Isa::W>(x + i);
  return residual ? value + load<Isa::W>(residual + i) : value;
}

// As processors with AVX512_BF16 round: like `store`, but subnormal numbers become 0.
template <class Isa, class T>
LDMKIT_INLINE void narrow(T* to, Float<Isa> value) {
  if constexpr (Isa::kBf16 && std::is_same_v<T, BFloat16>) {
    typename Vec<Isa::W>::H bits;
    asm("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(value));
    std::memcpy(to, &bits, sizeof(bits));
  } else {
    store<Isa::W>(to, value);
  }
}

// `stream` goes past the caches, for what is too large to be found there again.
template <class Isa, class T>
LDMKIT_INLINE void write(T* to, Float<Isa> value, bool stream) {
  if constexpr (kAvx<Isa::W>) {
    constexpr size_t kBytes = Isa::W * sizeof(T);
    if (stream && reinterpret_cast<uintptr_t>(to) % kBytes == 0) {
      typedef uint16_t Bits __attribute__((vector_size(kBytes), may_alias));
      Bits bits;
      narrow<Isa>(reinterpret_cast<T*>(&bits), value);
      asm("vmovntdq %1, %0" : "=m"(*reinterpret_cast<Bits*>(to)) : "v"(bits));
      return;
    }
  }
  narrow<Isa>(to, value);
}

LDMKIT_INLINE void end_stream(bool stream) {
#if defined(__x86_64__)
  if (stream) asm volatile("sfence" ::: "memory");
#endif
}

// A coefficient for a run of elements: of one channel, or of a channel each.
template <class Isa, bool kEach>
struct Values {
  const float* from;
  Float<Isa> same;
  LDMKIT_INLINE explicit Values(const float* coefficient) : from(coefficient), same(Float<Isa>{} + *coefficient) {}
  LDMKIT_INLINE Float<Isa> at(int64_t i) const {
    if constexpr (kEach) return load<Isa::W>(from + i);
    return same;
  }
};

template <int W>
struct HalfOfDoubles {
  typedef double D __attribute__((vector_size(4 * W)));
};

// Adds halves until one is left.
template <int W>
LDMKIT_INLINE double total_of(typename HalfOfDoubles<W>::D lanes) {
  if constexpr (W == 4) {
    return lanes[0] + lanes[1];
  } else {
    typename HalfOfDoubles<W / 2>::D low, high;
    std::memcpy(&low, &lanes, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&lanes) + sizeof(low), sizeof(high));
    return total_of<W / 2>(low + high);
  }
}

// As many doubles as vectors have floats.
template <class Isa>
struct Doubles {
  using Half = typename HalfOfDoubles<Isa::W>::D;
  Half low, high;

  static LDMKIT_INLINE Doubles of(Float<Isa> value) {
    typename Vec<Isa::W / 2>::F first, last;
    std::memcpy(&first, &value, sizeof(first));
    std::memcpy(&last, reinterpret_cast<const char*>(&value) + sizeof(first), sizeof(last));
    if constexpr (kAvx<Isa::W> && Isa::W == 16) {  // of __builtin_convertvector, GCC makes six instructions each
      Doubles wide;
      asm("vcvtps2pd %1, %0" : "=v"(wide.low) : "v"(first));
      asm("vcvtps2pd %1, %0" : "=v"(wide.high) : "v"(last));
      return wide;
    }
    return {__builtin_convertvector(first, Half), __builtin_convertvector(last, Half)};
  }
  static LDMKIT_INLINE Doubles at(const double* from) {
    Doubles value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  LDMKIT_INLINE void to(double* to) const { std::memcpy(to, this, sizeof(*this)); }
  LDMKIT_INLINE Doubles operator+(const Doubles& other) const { return {low + other.low, high + other.high}; }
  LDMKIT_INLINE Doubles operator*(const Doubles& other) const { return {low * other.low, high * other.high}; }
  LDMKIT_INLINE double total() const { return total_of<Isa::W>(low + high); }
};

// run(i, n, c) for the runs of a part: elements [i, i + n), of channel c, or of channels from c on.
template <class T, class Run>
LDMKIT_INLINE void for_each_plane(const Part<T>& part, const Run& run) {
  for (int64_t c = part.first; c < part.last; ++c) run(c * part.pixels + part.begin, part.end - part.begin, c);
}
template <class T, class Run>
LDMKIT_INLINE void for_each_row(const Part<T>& part, const Run& run) {
  for (int64_t p = part.begin; p < part.end; ++p) run(p * part.channels + part.first, part.last - part.first, part.first);
}

// ------------------------------------------------------------------------------------------------------------------------ SiLU

constexpr float kLog2E = 1.44269504088896341f;

// z / (1 + exp(-z))
template <class Isa>
LDMKIT_INLINE Float<Isa> silu_of(Float<Isa> z) {
  return z / (exp2<Isa::W>(z * -kLog2E) + 1.0f);
}

// Its derivative, s (1 + z (1 - s)) where s = 1 / (1 + exp(-z)).
template <class Isa>
LDMKIT_INLINE Float<Isa> silu_slope(Float<Isa> z) {
  const Float<Isa> s = 1.0f / (exp2<Isa::W>(z * -kLog2E) + 1.0f);
  return s * (1.0f + z * (1.0f - s));
}

// --------------------------------------------------------------------------------------------------------------------- moments

// Of h - pivot and (h - pivot)^2, in each lane.
template <class Isa>
struct Moments {
  Doubles<Isa> sum, square;
};

// A tile is a few vectors, `stride` elements apart. In each lane, of its values v = h - pivot: the mean, and the sum of
// (v - mean)^2, so that nothing cancels; from these, in double, sums of v and v^2, which only need adding: the pivot is one of
// the values, so doubles bear whatever cancels.
template <class Isa, int kCount, class T>
LDMKIT_INLINE void add_moments(const T* x, const T* residual, const Float<Isa>* shift, int64_t stride, int64_t count, int skip,
                               Float<Isa> pivot, Moments<Isa>& to) {
  const int64_t n = kCount ? kCount : count;
  const auto value = [&](int64_t j) __attribute__((always_inline)) {
    const Float<Isa> v = load_sum<Isa>(x, residual, j * stride);
    return (shift ? v + *shift : v) - pivot;
  };
  Float<Isa> mean = {}, spread = {};
  for (int64_t j = 0; j < n; ++j) mean += value(j);
  mean = skipping<Isa>(mean * (1.0f / static_cast<float>(n)), skip, Float<Isa>{});
  for (int64_t j = 0; j < n; ++j) {
    const Float<Isa> d = value(j) - mean;
    spread += d * d;
  }
  const Doubles<Isa> d = Doubles<Isa>::of(mean), nd = Doubles<Isa>::of(Float<Isa>{} + static_cast<float>(n)) * d;
  to.sum = to.sum + nd;
  to.square = to.square + Doubles<Isa>::of(skipping<Isa>(spread, skip, Float<Isa>{})) + nd * d;
}

template <class Isa, class T>
LDMKIT_INLINE void plane_moments(const Part<T>& part, const float* shift, float pivot, double* sum, double* square) {
  constexpr int W = Isa::W, kTile = Isa::kTile;
  const Float<Isa> pivots = Float<Isa>{} + pivot;
  Moments<Isa> moments = {};
  for_each_plane(part, [&](int64_t i, int64_t n, int64_t c) __attribute__((always_inline)) {
    const Float<Isa> same = Float<Isa>{} + (shift ? shift[c] : 0.0f);
    const T *x = part.x + i, *residual = part.residual ? part.residual + i : nullptr;
    for_each_tile<Isa>(n, [&](int64_t j, int64_t count, int skip) __attribute__((always_inline)) {
      if (count == kTile && !residual && !shift) {
        add_moments<Isa, kTile, T>(x + j, nullptr, nullptr, W, kTile, 0, pivots, moments);
      } else {
        add_moments<Isa, 0>(x + j, residual ? residual + j : nullptr, &same, W, count, skip, pivots, moments);
      }
    });
  });
  *sum += moments.sum.total();
  *square += moments.square.total();
}

template <class Isa, class T>
LDMKIT_INLINE void row_moments(const Part<T>& part, const float* shift, const float* pivot, double* sum, double* square) {
  constexpr int W = Isa::W, kTile = Isa::kTile;
  for (int64_t p = part.begin; p < part.end; p += kTile) {
    const int64_t count = std::min<int64_t>(kTile, part.end - p), at = p * part.channels;
    const T *x = part.x + at, *residual = part.residual ? part.residual + at : nullptr;
    for_each_vector<Isa>(part.first, part.last, [&](int64_t c, int skip) __attribute__((always_inline)) {
      const Float<Isa> pivots = load<W>(pivot + c);
      Moments<Isa> moments = {Doubles<Isa>::at(sum + c), Doubles<Isa>::at(square + c)};
      if (count == kTile && !residual && !shift && skip == 0) {
        add_moments<Isa, kTile, T>(x + c, nullptr, nullptr, part.channels, kTile, 0, pivots, moments);
      } else {
        const Float<Isa> each = shift ? load<W>(shift + c) : Float<Isa>{};
        add_moments<Isa, 0>(x + c, residual ? residual + c : nullptr, &each, part.channels, count, skip, pivots, moments);
      }
      moments.sum.to(sum + c);
      moments.square.to(square + c);
    });
  }
}

// ------------------------------------------------------------------------------------------------------------------- normalise

template <class Isa, bool kEach, class T>
LDMKIT_INLINE void normalise_run(const T* x, const T* residual, T* y, int64_t n, const Coefficients& k, int64_t c, bool silu,
                                 bool stream) {
  const Values<Isa, kEach> offset(k.offset + c), scale(k.scale + c), bias(k.bias + c);
  for_each_vector<Isa>(0, n, [&](int64_t i, int) __attribute__((always_inline)) {
    const Float<Isa> z = (load_sum<Isa>(x, residual, i) + offset.at(i)) * scale.at(i) + bias.at(i);
    write<Isa>(y + i, silu ? silu_of<Isa>(z) : z, stream);
  });
}

template <class Isa, class T>
LDMKIT_INLINE void plane_normalise(const Part<T>& part, const Coefficients& k, T* y, bool silu, bool stream) {
  for_each_plane(part, [&](int64_t i, int64_t n, int64_t c) __attribute__((always_inline)) {
    const T* residual = part.residual ? part.residual + i : nullptr;
    normalise_run<Isa, false>(part.x + i, residual, y + i, n, k, c, silu, stream);
  });
  end_stream(stream);
}

template <class Isa, class T>
LDMKIT_INLINE void row_normalise(const Part<T>& part, const Coefficients& k, T* y, bool silu, bool stream) {
  for_each_row(part, [&](int64_t i, int64_t n, int64_t c) __attribute__((always_inline)) {
    const T* residual = part.residual ? part.residual + i : nullptr;
    normalise_run<Isa, true>(part.x + i, residual, y + i, n, k, c, silu, stream);
  });
  end_stream(stream);
}

// -------------------------------------------------------------------------------------------------------------------- backward

template <class Isa>
struct Slope {
  Float<Isa> t, dz;
};

template <class Isa, class T>
LDMKIT_INLINE Slope<Isa> slope_at(const T* grad, const T* x, const T* residual, int64_t i, Float<Isa> offset, Float<Isa> scale,
                                  Float<Isa> bias, bool silu) {
  const Float<Isa> t = load_sum<Isa>(x, residual, i) + offset, g = load<Isa::W>(grad + i);
  return {t, silu ? g * silu_slope<Isa>(t * scale + bias) : g};
}

template <class Isa>
struct LaneSums {
  Doubles<Isa> dz, dz_t, t;
};

// Adds up to kTile vectors, `stride` elements apart: in float first, then in double.
template <class Isa, class T>
LDMKIT_INLINE void add_sums(const T* grad, const T* x, const T* residual, int64_t stride, int64_t count, int skip,
                            Float<Isa> offset, Float<Isa> scale, Float<Isa> bias, bool silu, LaneSums<Isa>& to, float* kept) {
  Float<Isa> dz = {}, dz_t = {}, t = {};
  for (int64_t j = 0; j < count; ++j) {
    const Slope<Isa> at = slope_at<Isa>(grad, x, residual, j * stride, offset, scale, bias, silu);
    if (kept) store<Isa::W>(kept + j * stride, at.dz);
    dz += at.dz;
    dz_t += at.dz * at.t;
    t += at.t;
  }
  to.dz = to.dz + Doubles<Isa>::of(skipping<Isa>(dz, skip, Float<Isa>{}));
  to.dz_t = to.dz_t + Doubles<Isa>::of(skipping<Isa>(dz_t, skip, Float<Isa>{}));
  to.t = to.t + Doubles<Isa>::of(skipping<Isa>(t, skip, Float<Isa>{}));
}

template <class Isa, class T>
LDMKIT_INLINE void plane_sums(const Part<T>& part, const T* grad, const Coefficients& k, bool silu, const Sums& to,
                              float* kept) {
  constexpr int W = Isa::W;
  for_each_plane(part, [&](int64_t i, int64_t n, int64_t c) __attribute__((always_inline)) {
    const Float<Isa> offset = Float<Isa>{} + k.offset[c], scale = Float<Isa>{} + k.scale[c], bias = Float<Isa>{} + k.bias[c];
    LaneSums<Isa> sums = {};
    for_each_tile<Isa>(n, [&](int64_t j, int64_t count, int skip) __attribute__((always_inline)) {
      const T* residual = part.residual ? part.residual + i + j : nullptr;
      add_sums<Isa>(grad + i + j, part.x + i + j, residual, W, count, skip, offset, scale, bias, silu, sums,
                    kept ? kept + i + j : nullptr);
    });
    to.dz[c] += sums.dz.total();
    to.dz_t[c] += sums.dz_t.total();
    to.t[c] += sums.t.total();
  });
}

template <class Isa, class T>
LDMKIT_INLINE void row_sums(const Part<T>& part, const T* grad, const Coefficients& k, bool silu, const Sums& to,
                            float* kept) {
  constexpr int W = Isa::W, kTile = Isa::kTile;
  for (int64_t p = part.begin; p < part.end; p += kTile) {
    const int64_t count = std::min<int64_t>(kTile, part.end - p), at = p * part.channels;
    const T* residual = part.residual ? part.residual + at : nullptr;
    for_each_vector<Isa>(part.first, part.last, [&](int64_t c, int skip) __attribute__((always_inline)) {
      LaneSums<Isa> sums = {Doubles<Isa>::at(to.dz + c), Doubles<Isa>::at(to.dz_t + c), Doubles<Isa>::at(to.t + c)};
      add_sums<Isa>(grad + at + c, part.x + at + c, residual ? residual + c : nullptr, part.channels, count, skip,
                    load<W>(k.offset + c), load<W>(k.scale + c), load<W>(k.bias + c), silu, sums,
                    kept ? kept + at + c : nullptr);
      sums.dz.to(to.dz + c);
      sums.dz_t.to(to.dz_t + c);
      sums.t.to(to.t + c);
    });
  }
}

template <class Isa, bool kEach, class T>
LDMKIT_INLINE void gradient_run(const T* grad, const float* kept, const T* x, const T* residual, T* grad_x, int64_t n,
                                const Coefficients& k, int64_t c, bool silu, bool stream) {
  const Values<Isa, kEach> offset(k.offset + c), scale(k.scale + c), bias(k.bias + c), slope(k.slope + c),
      constant(k.constant + c);
  for_each_vector<Isa>(0, n, [&](int64_t i, int) __attribute__((always_inline)) {
    const Float<Isa> a = scale.at(i);
    const Slope<Isa> at = kept ? Slope<Isa>{load_sum<Isa>(x, residual, i) + offset.at(i), load<Isa::W>(kept + i)}
                               : slope_at<Isa>(grad, x, residual, i, offset.at(i), a, bias.at(i), silu);
    write<Isa>(grad_x + i, at.dz * a + (at.t * slope.at(i) + constant.at(i)), stream);
  });
}

template <class Isa, class T>
LDMKIT_INLINE void plane_gradient(const Part<T>& part, const T* grad, const float* kept, const Coefficients& k, T* grad_x,
                                  bool silu, bool stream) {
  for_each_plane(part, [&](int64_t i, int64_t n, int64_t c) __attribute__((always_inline)) {
    const T* residual = part.residual ? part.residual + i : nullptr;
    gradient_run<Isa, false>(grad + i, kept ? kept + i : nullptr, part.x + i, residual, grad_x + i, n, k, c, silu, stream);
  });
  end_stream(stream);
}

template <class Isa, class T>
LDMKIT_INLINE void row_gradient(const Part<T>& part, const T* grad, const float* kept, const Coefficients& k, T* grad_x,
                                bool silu, bool stream) {
  for_each_row(part, [&](int64_t i, int64_t n, int64_t c) __attribute__((always_inline)) {
    const T* residual = part.residual ? part.residual + i : nullptr;
    gradient_run<Isa, true>(grad + i, kept ? kept + i : nullptr, part.x + i, residual, grad_x + i, n, k, c, silu, stream);
  });
  end_stream(stream);
}

}  // namespace ldmkit::group_norm
