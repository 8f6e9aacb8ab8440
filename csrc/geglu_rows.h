// The loops of GEGLU and their arithmetic. No include guard: geglu.cpp includes this once for each instruction set, in a namespace
// with a `Machine` (what the processor does better than plain vector code) and with LDMKIT_TARGET, the attribute of its functions.

constexpr int W = Machine::W;
constexpr int K = 4;
constexpr int64_t kStep = K * W;
using F = Vec<W>::F;
using U = Vec<W>::U;

// K vectors are in flight at a time, to hide the latency of long chains of multiply-adds.
struct Block {
  F v[K];
};

template <class T>
LDMKIT_HERE Block load_block(const T* from) {
  Block block;
  for (int k = 0; k < K; ++k) block.v[k] = load<W>(from + k * W);
  return block;
}

// One vector of words holds two vectors of bf16, its low and its high halves: nothing has to cross lanes.
LDMKIT_HERE Block load_block(const BFloat16* from) {
  Block block;
  for (int k = 0; k < K; k += 2) {
    U words;
    std::memcpy(&words, from + k * W, sizeof(words));
    block.v[k] = bit_cast<F>(words << 16);
    block.v[k + 1] = bit_cast<F>(words & 0xffff0000u);
  }
  return block;
}

template <bool kStream, class V>
LDMKIT_HERE void put(void* to, V value) {
  if constexpr (kStream) {
    Machine::stream(to, value);
  } else {
    std::memcpy(to, &value, sizeof(value));
  }
}

template <bool kStream>
LDMKIT_HERE void store_block(float* to, const Block& block) {
  for (int k = 0; k < K; ++k) put<kStream>(to + k * W, block.v[k]);
}

template <bool kStream>
LDMKIT_HERE void store_block(Half* to, const Block& block) {
  for (int k = 0; k < K; ++k) put<kStream>(to + k * W, Machine::narrow(block.v[k]));
}

// To nearest, ties to even. A NaN came in as bf16 or is the processor's own: its low half is zero, and it stays NaN.
LDMKIT_HERE U rounded_to_high_half(F value) {
  const U bits = bit_cast<U>(value);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

template <bool kStream>
LDMKIT_HERE void store_block(BFloat16* to, const Block& block) {
  for (int k = 0; k < K; k += 2) {
    const U low = rounded_to_high_half(block.v[k]) >> 16, high = rounded_to_high_half(block.v[k + 1]) & 0xffff0000u;
    put<kStream>(to + k * W, low | high);
  }
}

template <size_t kTerms>
LDMKIT_HERE Block polynomial(const float (&coefficients)[kTerms], const Block& x) {
  Block sum;
  for (int k = 0; k < K; ++k) sum.v[k] = F{} + coefficients[0];
  for (size_t i = 1; i < kTerms; ++i) {
    for (int k = 0; k < K; ++k) sum.v[k] = sum.v[k] * x.v[k] + coefficients[i];
  }
  return sum;
}

// exp(-u^2 / 2), 0 <= u <= 14.5, to a rounding or two where T is float, else to 2.6e-6; both relative.
template <class T>
LDMKIT_HERE Block bell_curve(const Block& u) {
  Block power, rest, e;
  if constexpr (std::is_same_v<T, float>) {
    // Cody and Waite: -u^2 / 2 = power ln 2 + rest, ln 2 in two parts; u^2 in two parts, too, for its rounding counts in the tails.
    constexpr float kExp[] = {0.00829030367764f, 0.0418980226997f, 0.16667636865f, 0.49999148842f, 0.999999706878f, 1.0f};
    for (int k = 0; k < K; ++k) {
      const F minus_half = u.v[k] * -0.5f, t = u.v[k] * minus_half;
      power.v[k] = Machine::nearest(t * 1.44269504088896341f);
      rest.v[k] = (t - power.v[k] * 0.693359375f) + power.v[k] * 2.12194440e-4f + Machine::product_error(u.v[k], minus_half, t);
    }
    e = polynomial(kExp, rest);
  } else {
    constexpr float kExp2[] = {0.00957010548998f, 0.0559178628785f, 0.240247447048f, 0.693121814205f, 0.999999261548f};
    for (int k = 0; k < K; ++k) {
      const F t = u.v[k] * (u.v[k] * -0.721347520444481703680f);
      power.v[k] = Machine::nearest(t);
      rest.v[k] = t - power.v[k];
    }
    e = polynomial(kExp2, rest);
  }
  for (int k = 0; k < K; ++k) e.v[k] = Machine::scale(e.v[k], power.v[k]);
  return e;
}

// Phi(x), the normal distribution function, and exp(-x^2 / 2), from which GELU(x) = x Phi(x) and its derivative follow.
struct Normal {
  Block cdf, bell;
};

// The upper tail Q(u) = 1 - Phi(u), u >= 0, is exp(-u^2 / 2) R(u), and R(u) (u + a) is nearly constant: a polynomial in
// s = (u - a) / (u + a), minimax in relative error (1.5e-8, or 3.7e-6 where the result is rounded to 16 bits). So tails keep their
// relative accuracy, which 1 + erf(x) loses to cancellation. At u = 14.5 and beyond, exp(-u^2 / 2) is zero.
// (The substitution is that of Shepherd and Laframboise 1981, doi:10.1090/S0025-5718-1981-0595058-X.)
template <class T>
LDMKIT_HERE Normal normal(const Block& x) {
  constexpr float kFull[] = {0.000443449805334f, 0.000509628652013f, -0.00416901806183f, 0.0012000735313f, 0.0374925064924f,
                             -0.15152083506f,    0.352939604233f,    -0.588188277668f,   0.750294074215f};
  constexpr float kHalf[] = {0.00769690031308f, 0.000395384417596f, -0.0807989459817f,
                             0.274564186459f,   -0.539496404156f,   0.737435975748f};
  constexpr bool full = std::is_same_v<T, float>;
  constexpr float a = full ? 3.75f : 3.25f;

  Block u, q, s, ratio;
  for (int k = 0; k < K; ++k) {
    u.v[k] = Machine::at_most(bit_cast<F>(bit_cast<U>(x.v[k]) & 0x7fffffffu), F{} + 14.5f);
    q.v[k] = 1.0f / (u.v[k] + a);
    s.v[k] = (u.v[k] - a) * q.v[k];
  }
  const Block bell = bell_curve<T>(u);
  if constexpr (full) {
    ratio = polynomial(kFull, s);
  } else {
    ratio = polynomial(kHalf, s);
  }
  Block cdf;
  for (int k = 0; k < K; ++k) {
    const F tail = bell.v[k] * (ratio.v[k] * q.v[k]);
    cdf.v[k] = (x.v[k] < 0.0f) ? tail : 1.0f - tail;
  }
  return {cdf, bell};
}

template <bool kStream, class T>
LDMKIT_HERE void forward_step(const T* value, const T* gate, T* y) {
  const Block b = load_block(gate);
  const Normal phi = normal<T>(b);
  Block a = load_block(value);
  for (int k = 0; k < K; ++k) a.v[k] *= b.v[k] * phi.cdf.v[k];
  store_block<kStream>(y, a);
}

template <bool kStream, class T>
LDMKIT_HERE void backward_step(const T* grad, const T* value, const T* gate, T* grad_value, T* grad_gate) {
  const Block b = load_block(gate);
  const Normal phi = normal<T>(b);
  const Block g = load_block(grad);
  Block a = load_block(value), out;
  for (int k = 0; k < K; ++k) out.v[k] = g.v[k] * (b.v[k] * phi.cdf.v[k]);
  store_block<kStream>(grad_value, out);
  for (int k = 0; k < K; ++k) {
    a.v[k] = g.v[k] * a.v[k] * (phi.cdf.v[k] + b.v[k] * (phi.bell.v[k] * 0.398942280401432677939946f));
  }
  store_block<kStream>(grad_gate, a);
}

// A row's last few elements go through a padded copy, so that each element sees the same arithmetic wherever it stands.
template <bool kStream, class T>
LDMKIT_HERE void forward_rows(const void* x_data, int64_t x_stride, void* y_data, const GegluSlice& slice) {
  const int64_t n = slice.n, end = slice.column + slice.columns;
  for (int64_t row = slice.row_begin; row < slice.row_end; ++row) {
    const T* x = static_cast<const T*>(x_data) + row * x_stride;
    T* y = static_cast<T*>(y_data) + row * n;
    int64_t i = slice.column;
    for (; i + kStep <= end; i += kStep) forward_step<kStream>(x + i, x + n + i, y + i);
    if (i < end) {
      const size_t bytes = (end - i) * sizeof(T);
      T value[kStep] = {}, gate[kStep] = {}, out[kStep];
      std::memcpy(value, x + i, bytes);
      std::memcpy(gate, x + n + i, bytes);
      forward_step<false>(value, gate, out);
      std::memcpy(y + i, out, bytes);
    }
  }
}

template <bool kStream, class T>
LDMKIT_HERE void backward_rows(const void* grad_data, int64_t grad_stride, const void* x_data, int64_t x_stride,
                               void* grad_x_data, const GegluSlice& slice) {
  const int64_t n = slice.n, end = slice.column + slice.columns;
  for (int64_t row = slice.row_begin; row < slice.row_end; ++row) {
    const T* grad = static_cast<const T*>(grad_data) + row * grad_stride;
    const T* x = static_cast<const T*>(x_data) + row * x_stride;
    T* grad_x = static_cast<T*>(grad_x_data) + row * 2 * n;
    int64_t i = slice.column;
    for (; i + kStep <= end; i += kStep) backward_step<kStream>(grad + i, x + i, x + n + i, grad_x + i, grad_x + n + i);
    if (i < end) {
      const size_t bytes = (end - i) * sizeof(T);
      T g[kStep] = {}, value[kStep] = {}, gate[kStep] = {}, grad_value[kStep], grad_gate[kStep];
      std::memcpy(g, grad + i, bytes);
      std::memcpy(value, x + i, bytes);
      std::memcpy(gate, x + n + i, bytes);
      backward_step<false>(g, value, gate, grad_value, grad_gate);
      std::memcpy(grad_x + i, grad_value, bytes);
      std::memcpy(grad_x + n + i, grad_gate, bytes);
    }
  }
}

template <bool kStream>
LDMKIT_TARGET void forward_as(Dtype dtype, const void* x, int64_t x_stride, void* y, const GegluSlice& slice) {
  switch (dtype) {
    case Dtype::f32: return forward_rows<kStream, float>(x, x_stride, y, slice);
    case Dtype::f16: return forward_rows<kStream, Half>(x, x_stride, y, slice);
    case Dtype::bf16: return forward_rows<kStream, BFloat16>(x, x_stride, y, slice);
    case Dtype::f64: return forward_double(x, x_stride, y, slice);
  }
}

template <bool kStream>
LDMKIT_TARGET void backward_as(Dtype dtype, const void* grad, int64_t grad_stride, const void* x, int64_t x_stride, void* grad_x,
                               const GegluSlice& slice) {
  switch (dtype) {
    case Dtype::f32: return backward_rows<kStream, float>(grad, grad_stride, x, x_stride, grad_x, slice);
    case Dtype::f16: return backward_rows<kStream, Half>(grad, grad_stride, x, x_stride, grad_x, slice);
    case Dtype::bf16: return backward_rows<kStream, BFloat16>(grad, grad_stride, x, x_stride, grad_x, slice);
    case Dtype::f64: return backward_double(grad, grad_stride, x, x_stride, grad_x, slice);
  }
}

LDMKIT_TARGET void forward(Dtype dtype, const void* x, int64_t x_stride, void* y, const GegluSlice& slice) {
  if (!slice.stream) return forward_as<false>(dtype, x, x_stride, y, slice);
  forward_as<true>(dtype, x, x_stride, y, slice);
  Machine::fence();
}

LDMKIT_TARGET void backward(Dtype dtype, const void* grad, int64_t grad_stride, const void* x, int64_t x_stride, void* grad_x,
                            const GegluSlice& slice) {
  if (!slice.stream) return backward_as<false>(dtype, grad, grad_stride, x, x_stride, grad_x, slice);
  backward_as<true>(dtype, grad, grad_stride, x, x_stride, grad_x, slice);
  Machine::fence();
}
