// Small fixed-width vectors in GCC's and Clang's vector extensions, loaded from and stored to the four dtypes. Everything is
// inlined into its caller, and so compiled for the caller's instruction set: on x86, 8 lanes are AVX2 with F16C, 16 are AVX-512,
// and where those have one instruction that the compiler would not find, it is named.
#pragma once

#include <cstdint>
#include <cstring>

#define LDMKIT_INLINE inline __attribute__((always_inline))

namespace ldmkit {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <int W>
struct Vec {
  typedef float F __attribute__((vector_size(4 * W)));
  typedef uint32_t U __attribute__((vector_size(4 * W)));
  typedef uint16_t H __attribute__((vector_size(2 * W)));
};

template <class To, class From>
LDMKIT_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Whether W lanes are a vector of AVX2 or AVX-512.
template <int W>
inline constexpr bool kAvx =
#if defined(__x86_64__)
    W >= 8;
#else
    false;
#endif

template <int W>
LDMKIT_INLINE typename Vec<W>::U load_bits(const void* from) {
  typename Vec<W>::H narrow;
  std::memcpy(&narrow, from, sizeof(narrow));
  if constexpr (kAvx<W>) {
    typename Vec<W>::U wide;
    asm("vpmovzxwd %1, %0" : "=v"(wide) : "vm"(narrow));
    return wide;
  } else {
    return __builtin_convertvector(narrow, typename Vec<W>::U);
  }
}

template <int W>
LDMKIT_INLINE void store_bits(void* to, typename Vec<W>::U bits) {
  typename Vec<W>::H narrow;
  if constexpr (kAvx<W> && W == 16) {
    asm("vpmovdw %1, %0" : "=v"(narrow) : "v"(bits));
  } else {
    narrow = __builtin_convertvector(bits, typename Vec<W>::H);
  }
  std::memcpy(to, &narrow, sizeof(narrow));
}

template <int W>
LDMKIT_INLINE typename Vec<W>::F load(const float* from) {
  typename Vec<W>::F value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <int W>
LDMKIT_INLINE void store(float* to, typename Vec<W>::F value) {
  std::memcpy(to, &value, sizeof(value));
}

template <int W>
LDMKIT_INLINE typename Vec<W>::F load(const BFloat16* from) {
  return bit_cast<typename Vec<W>::F>(load_bits<W>(from) << 16);
}

// Round to nearest even; NaN stays NaN.
template <int W>
LDMKIT_INLINE void store(BFloat16* to, typename Vec<W>::F value) {
  using U = typename Vec<W>::U;
  const U bits = bit_cast<U>(value);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U nan = rounded - rounded + 0x7fc0u;
  store_bits<W>(to, (value != value) ? nan : rounded);
}

// Without F16C, both directions of fp16 follow Maratyszcza's FP16 library, as c10/util/Half.h does: exact for subnormals, no
// branches.
template <int W>
LDMKIT_INLINE typename Vec<W>::F load(const Half* from) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  if constexpr (kAvx<W>) {
    typename Vec<W>::H narrow;
    F wide;
    std::memcpy(&narrow, from, sizeof(narrow));
    asm("vcvtph2ps %1, %0" : "=v"(wide) : "vm"(narrow));
    return wide;
  }
  const U high = load_bits<W>(from) << 16;
  const U twice = high + high;
  const F normal = bit_cast<F>((twice >> 4) + (0xe0u << 23)) * 0x1.0p-112f;
  const F subnormal = bit_cast<F>((twice >> 17) | (126u << 23)) - 0.5f;
  const U magnitude = (twice < (1u << 27)) ? bit_cast<U>(subnormal) : bit_cast<U>(normal);
  return bit_cast<F>((high & 0x80000000u) | magnitude);
}

template <int W>
LDMKIT_INLINE void store(Half* to, typename Vec<W>::F value) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  if constexpr (kAvx<W>) {
    typename Vec<W>::H narrow;
    asm("vcvtps2ph $0, %1, %0" : "=v"(narrow) : "v"(value));  // 0: to nearest, ties to even
    std::memcpy(to, &narrow, sizeof(narrow));
    return;
  }
  const U bits = bit_cast<U>(value);
  const U twice = bits + bits;
  const U least = bits - bits + 0x71000000u;
  const U exponent = twice & 0xff000000u;
  const U bias = (exponent < least) ? least : exponent;
  const F scaled = (bit_cast<F>(bits & 0x7fffffffu) * 0x1.0p+112f) * 0x1.0p-110f;
  const U sum = bit_cast<U>(bit_cast<F>((bias >> 1) + 0x07800000u) + scaled);
  const U finite = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  const U nan = bits - bits + 0x7e00u;
  store_bits<W>(to, ((bits & 0x80000000u) >> 16) | ((twice > 0xff000000u) ? nan : finite));
}

// 2^t within 2e-7 of itself: inf from 128 on, no more than 2^-126 below that, exact at 0, NaN of NaN. The polynomial is minimax in
// relative error over [-1/2, 1/2] (9.2e-8 before rounding) with its constant fixed to 1.
template <int W>
LDMKIT_INLINE typename Vec<W>::F exp2(typename Vec<W>::F t) {
  using F = typename Vec<W>::F;
  using U = typename Vec<W>::U;
  const F zero = {};
  const auto power = [&](F f) {
    F p = zero + 0.0013264727f;
    p = p * f + 0.009671513f;
    p = p * f + 0.055507336f;
    p = p * f + 0.24022242f;
    p = p * f + 0.693147f;
    return p * f + 1.0f;
  };
  if constexpr (kAvx<W> && W == 16) {
    F k, scaled;
    asm("vrndscaleps $0, %1, %0" : "=v"(k) : "v"(t));
    asm("vscalefps %2, %1, %0" : "=v"(scaled) : "v"(power(t - k)), "v"(k));
    return scaled;
  } else {
    const F high = zero + 128.0f, low = zero - 126.0f, rounder = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds
    t = (high < t) ? high : t;
    t = (t < low) ? low : t;
    const F shifted = t + rounder;
    return bit_cast<F>(bit_cast<U>(power(t - (shifted - rounder))) + (bit_cast<U>(shifted) << 23));
  }
}

}  // namespace ldmkit
