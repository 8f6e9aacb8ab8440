// GEGLU for the CPU (Shazeer 2020, arXiv:2002.05202, eq. 6): vectorised, in three instruction sets chosen at run time.
#include "geglu.h"

#include <cmath>

#include "instruction_set.h"
#include "vector.h"

namespace ldmkit {
namespace {

// Phi(x), the normal distribution function, and exp(-x^2 / 2), from which GELU(x) = x Phi(x) and its derivative follow.
template <class F>
struct Normal {
  F cdf, bell;
};

constexpr float kInverseSqrtTwoPi = 0.398942280401432677939946f;

// The upper tail Q(u) = 1 - Phi(u), u >= 0, is exp(-u^2 / 2) R(u), and R(u) (u + a) is nearly constant: a polynomial in
// s = (u - a) / (u + a), a = 3.5, minimax in relative error (6.4e-9 before rounding). So tails keep their relative accuracy, which
// 1 + erf(x) loses to cancellation. (The substitution is that of Shepherd and Laframboise 1981, doi:10.1090/S0025-5718-1981-0595058-X.)
template <int W>
LDMKIT_INLINE Normal<typename Vec<W>::F> normal(typename Vec<W>::F x) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  const F zero = {};
  const F far = zero + 13.2f;  // exp(-u^2 / 2) leaves the normal numbers just beyond
  const F magnitude = bit_cast<F>(bit_cast<U>(x) & 0x7fffffffu);
  const F u = (magnitude < far) ? magnitude : far;

  // exp(-u^2 / 2), Cody and Waite: u = high + low with high^2 exact, k = round(-u^2 / (2 ln 2)), ln 2 in two parts.
  const F high = bit_cast<F>(bit_cast<U>(u) & 0xfffff000u);
  const F half_square = high * high * -0.5f;
  const F rounder = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const F shifted = half_square * 1.44269504088896341f + rounder;
  const F k = shifted - rounder;
  const F r = (half_square - k * 0.693359375f) + ((u - high) * (u + high) * -0.5f + k * 2.12194440e-4f);
  F e = zero + 1.0f / 5040.0f;
  e = e * r + 1.0f / 720.0f;
  e = e * r + 1.0f / 120.0f;
  e = e * r + 1.0f / 24.0f;
  e = e * r + 1.0f / 6.0f;
  e = e * r + 0.5f;
  e = e * r * r + r + 1.0f;
  const U power = (bit_cast<U>(shifted) - bit_cast<U>(rounder) + 127u) << 23;
  const F bell = (magnitude > far) ? zero : e * bit_cast<F>(power);

  const F q = 1.0f / (u + 3.5f);
  const F s = (u - 3.5f) * q;
  F p = zero + 0.000112737034f;
  p = p * s + 0.0004256609f;
  p = p * s - 0.0004946537f;
  p = p * s - 0.003177798f;
  p = p * s + 0.006492409f;
  p = p * s + 0.01740691f;
  p = p * s - 0.116052896f;
  p = p * s + 0.315425f;
  p = p * s - 0.5655618f;
  p = p * s + 0.74441606f;
  const F tail = bell * (p * q);
  return {(x < zero) ? tail : 1.0f - tail, bell * kInverseSqrtTwoPi};
}

template <int W, class T>
struct Rows {
  static LDMKIT_INLINE void forward(const T* value, const T* gate, T* y) {
    const auto b = load<W>(gate);
    store<W>(y, load<W>(value) * (b * normal<W>(b).cdf));
  }

  static LDMKIT_INLINE void backward(const T* grad, const T* value, const T* gate, T* grad_value, T* grad_gate) {
    const auto g = load<W>(grad), a = load<W>(value), b = load<W>(gate);
    const auto phi = normal<W>(b);
    store<W>(grad_value, g * (b * phi.cdf));
    store<W>(grad_gate, g * a * (phi.cdf + b * phi.bell));
  }
};

// fp64 serves checks, not speed: the C library's own functions, one element at a time.
template <int W>
struct Rows<W, double> {
  static LDMKIT_INLINE double cdf(double x) { return 0.5 * std::erfc(x * -0.70710678118654752440); }

  static LDMKIT_INLINE void forward(const double* value, const double* gate, double* y) {
    for (int i = 0; i < W; ++i) y[i] = value[i] * (gate[i] * cdf(gate[i]));
  }

  static LDMKIT_INLINE void backward(const double* grad, const double* value, const double* gate, double* grad_value,
                                     double* grad_gate) {
    for (int i = 0; i < W; ++i) {
      const double b = gate[i], phi = cdf(b), bell = 0.398942280401432677939946 * std::exp(-0.5 * b * b);
      grad_value[i] = grad[i] * (b * phi);
      grad_gate[i] = grad[i] * value[i] * (phi + b * bell);
    }
  }
};

// A row's last few elements go through a padded copy, so that each element sees the same arithmetic wherever it stands.
template <int W, class T>
LDMKIT_INLINE void forward(const void* x_data, int64_t x_stride, void* y_data, const GegluSlice& slice) {
  const int64_t n = slice.n, end = slice.column + slice.columns;
  for (int64_t row = slice.row_begin; row < slice.row_end; ++row) {
    const T* x = static_cast<const T*>(x_data) + row * x_stride;
    T* y = static_cast<T*>(y_data) + row * n;
    int64_t i = slice.column;
    for (; i + W <= end; i += W) Rows<W, T>::forward(x + i, x + n + i, y + i);
    if (i < end) {
      T value[W] = {}, gate[W] = {}, out[W];
      std::memcpy(value, x + i, (end - i) * sizeof(T));
      std::memcpy(gate, x + n + i, (end - i) * sizeof(T));
      Rows<W, T>::forward(value, gate, out);
      std::memcpy(y + i, out, (end - i) * sizeof(T));
    }
  }
}

template <int W, class T>
LDMKIT_INLINE void backward(const void* grad_data, int64_t grad_stride, const void* x_data, int64_t x_stride, void* grad_x_data,
                            const GegluSlice& slice) {
  const int64_t n = slice.n, end = slice.column + slice.columns;
  for (int64_t row = slice.row_begin; row < slice.row_end; ++row) {
    const T* grad = static_cast<const T*>(grad_data) + row * grad_stride;
    const T* x = static_cast<const T*>(x_data) + row * x_stride;
    T* grad_x = static_cast<T*>(grad_x_data) + row * 2 * n;
    int64_t i = slice.column;
    for (; i + W <= end; i += W) Rows<W, T>::backward(grad + i, x + i, x + n + i, grad_x + i, grad_x + n + i);
    if (i < end) {
      const size_t bytes = (end - i) * sizeof(T);
      T g[W] = {}, value[W] = {}, gate[W] = {}, grad_value[W], grad_gate[W];
      std::memcpy(g, grad + i, bytes);
      std::memcpy(value, x + i, bytes);
      std::memcpy(gate, x + n + i, bytes);
      Rows<W, T>::backward(g, value, gate, grad_value, grad_gate);
      std::memcpy(grad_x + i, grad_value, bytes);
      std::memcpy(grad_x + n + i, grad_gate, bytes);
    }
  }
}

// The two loops in one instruction set, for a dtype known at run time.
#define LDMKIT_GEGLU_VARIANT(NAME, TARGET, W)                                                                                    \
  TARGET void forward_##NAME(Dtype dtype, const void* x, int64_t x_stride, void* y, const GegluSlice& slice) {                    \
    switch (dtype) {                                                                                                              \
      case Dtype::f32: return forward<W, float>(x, x_stride, y, slice);                                                           \
      case Dtype::f64: return forward<W, double>(x, x_stride, y, slice);                                                          \
      case Dtype::f16: return forward<W, Half>(x, x_stride, y, slice);                                                            \
      case Dtype::bf16: return forward<W, BFloat16>(x, x_stride, y, slice);                                                       \
    }                                                                                                                             \
  }                                                                                                                               \
  TARGET void backward_##NAME(Dtype dtype, const void* grad, int64_t grad_stride, const void* x, int64_t x_stride, void* grad_x,  \
                              const GegluSlice& slice) {                                                                          \
    switch (dtype) {                                                                                                              \
      case Dtype::f32: return backward<W, float>(grad, grad_stride, x, x_stride, grad_x, slice);                                  \
      case Dtype::f64: return backward<W, double>(grad, grad_stride, x, x_stride, grad_x, slice);                                 \
      case Dtype::f16: return backward<W, Half>(grad, grad_stride, x, x_stride, grad_x, slice);                                   \
      case Dtype::bf16: return backward<W, BFloat16>(grad, grad_stride, x, x_stride, grad_x, slice);                              \
    }                                                                                                                             \
  }

LDMKIT_GEGLU_VARIANT(default, , 4)
#if defined(__x86_64__)
LDMKIT_GEGLU_VARIANT(avx2, __attribute__((target("avx2,fma"))), 8)
LDMKIT_GEGLU_VARIANT(avx512, __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), 16)
#endif

struct Variant {
  decltype(&forward_default) forward;
  decltype(&backward_default) backward;
};

Variant pick() {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::avx512_bf16:
    case InstructionSet::avx512: return {forward_avx512, backward_avx512};
    case InstructionSet::avx2: return {forward_avx2, backward_avx2};
    case InstructionSet::baseline: break;
  }
#endif
  return {forward_default, backward_default};
}

const Variant& variant() {
  static const Variant picked = pick();
  return picked;
}

}  // namespace

void geglu_forward_cpu(Dtype dtype, const void* x, int64_t x_stride, void* y, const GegluSlice& slice) {
  variant().forward(dtype, x, x_stride, y, slice);
}

void geglu_backward_cpu(Dtype dtype, const void* grad, int64_t grad_stride, const void* x, int64_t x_stride, void* grad_x,
                        const GegluSlice& slice) {
  variant().backward(dtype, grad, grad_stride, x, x_stride, grad_x, slice);
}

}  // namespace ldmkit
