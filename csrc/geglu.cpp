// GEGLU for the CPU (Shazeer 2020, arXiv:2002.05202, eq. 6): vectorised, in three instruction sets chosen at run time.
#include "geglu.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "instruction_set.h"
#include "vector.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own intrinsics, https://gcc.gnu.org/PR105593
#endif

namespace ldmkit {
namespace {

// fp64 serves checks, not speed: the C library's own functions, one element at a time.
double normal_cdf(double x) { return 0.5 * std::erfc(x * -0.70710678118654752440); }

void forward_double(const void* x_data, int64_t x_stride, void* y_data, const GegluSlice& slice) {
  for (int64_t row = slice.row_begin; row < slice.row_end; ++row) {
    const double *value = static_cast<const double*>(x_data) + row * x_stride, *gate = value + slice.n;
    double* y = static_cast<double*>(y_data) + row * slice.n;
    for (int64_t i = slice.column; i < slice.column + slice.columns; ++i) {
      y[i] = value[i] * (gate[i] * normal_cdf(gate[i]));
    }
  }
}

void backward_double(const void* grad_data, int64_t grad_stride, const void* x_data, int64_t x_stride, void* grad_x_data,
                     const GegluSlice& slice) {
  for (int64_t row = slice.row_begin; row < slice.row_end; ++row) {
    const double* grad = static_cast<const double*>(grad_data) + row * grad_stride;
    const double *value = static_cast<const double*>(x_data) + row * x_stride, *gate = value + slice.n;
    double *grad_value = static_cast<double*>(grad_x_data) + row * 2 * slice.n, *grad_gate = grad_value + slice.n;
    for (int64_t i = slice.column; i < slice.column + slice.columns; ++i) {
      const double b = gate[i], cdf = normal_cdf(b), bell = 0.398942280401432677939946 * std::exp(-0.5 * b * b);
      grad_value[i] = grad[i] * (b * cdf);
      grad_gate[i] = grad[i] * value[i] * (cdf + b * bell);
    }
  }
}

#define LDMKIT_HERE LDMKIT_TARGET LDMKIT_INLINE

// What plain vector code can do anywhere. The magic number, 1.5 * 2^23, rounds to an integer whatever is added to it.
namespace baseline {
#define LDMKIT_TARGET
struct Machine {
  static constexpr int W = 4;
  using F = Vec<W>::F;
  using U = Vec<W>::U;

  static LDMKIT_HERE F nearest(F x) { return (x + 12582912.0f) - 12582912.0f; }

  static LDMKIT_HERE F at_most(F x, F limit) { return (x > limit) ? limit : x; }

  // x 2^k for an integral k >= -160: in two steps, for the result may be subnormal.
  static LDMKIT_HERE F scale(F x, F k) {
    const U power = (bit_cast<U>(k + (12582912.0f + 64.0f)) + 127u) << 23;
    return x * bit_cast<F>(power) * 0x1p-64f;
  }

  // x y - product, exactly, where `product` is x y rounded and y is x times a power of two: products of upper halves are exact.
  static LDMKIT_HERE F product_error(F x, F y, F product) {
    const F x_high = bit_cast<F>(bit_cast<U>(x) & 0xfffff000u), y_high = bit_cast<F>(bit_cast<U>(y) & 0xfffff000u);
    return (x_high * y_high - product) + (x - x_high) * (y + y_high);
  }

  static LDMKIT_HERE Vec<W>::H narrow(F value) {
    Half narrow[W];
    ldmkit::store<W>(narrow, value);
    return bit_cast<Vec<W>::H>(narrow);
  }

  // Without stores that pass the caches by, an ordinary one.
  template <class V>
  static LDMKIT_HERE void stream(void* to, V value) { std::memcpy(to, &value, sizeof(value)); }
  static LDMKIT_HERE void fence() {}
};
#include "geglu_rows.h"
#undef LDMKIT_TARGET
}  // namespace baseline

#if defined(__x86_64__)
namespace avx2 {
#define LDMKIT_TARGET LDMKIT_TARGET_AVX2
struct Machine {
  static constexpr int W = 8;

  static LDMKIT_HERE __m256 nearest(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static LDMKIT_HERE __m256 at_most(__m256 x, __m256 limit) { return _mm256_min_ps(limit, x); }
  static LDMKIT_HERE __m256 product_error(__m256 x, __m256 y, __m256 product) { return _mm256_fmsub_ps(x, y, product); }
  static LDMKIT_HERE __m128i narrow(__m256 value) { return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }

  // x 2^k for an integral k >= -160: in two steps, for the result may be subnormal.
  static LDMKIT_HERE __m256 scale(__m256 x, __m256 k) {
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(k), _mm256_set1_epi32(127 + 64)), 23);
    return x * _mm256_castsi256_ps(power) * 0x1p-64f;
  }

  static LDMKIT_HERE void stream(void* to, __m256 value) { _mm256_stream_ps((float*)to, value); }
  static LDMKIT_HERE void stream(void* to, Vec<W>::U value) { _mm256_stream_si256((__m256i*)to, (__m256i)value); }
  static LDMKIT_HERE void stream(void* to, __m128i value) { _mm_stream_si128((__m128i*)to, value); }
  static LDMKIT_HERE void fence() { _mm_sfence(); }
};
#include "geglu_rows.h"
#undef LDMKIT_TARGET
}  // namespace avx2

namespace avx512 {
#define LDMKIT_TARGET LDMKIT_TARGET_AVX512
struct Machine {
  static constexpr int W = 16;

  static LDMKIT_HERE __m512 nearest(__m512 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static LDMKIT_HERE __m512 at_most(__m512 x, __m512 limit) { return _mm512_min_ps(limit, x); }
  static LDMKIT_HERE __m512 product_error(__m512 x, __m512 y, __m512 product) { return _mm512_fmsub_ps(x, y, product); }
  static LDMKIT_HERE __m512 scale(__m512 x, __m512 k) { return _mm512_scalef_ps(x, k); }
  static LDMKIT_HERE __m256i narrow(__m512 value) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }

  static LDMKIT_HERE void stream(void* to, __m512 value) { _mm512_stream_ps((float*)to, value); }
  static LDMKIT_HERE void stream(void* to, Vec<W>::U value) { _mm512_stream_si512((__m512i*)to, (__m512i)value); }
  static LDMKIT_HERE void stream(void* to, __m256i value) { _mm256_stream_si256((__m256i*)to, value); }
  static LDMKIT_HERE void fence() { _mm_sfence(); }
};
#include "geglu_rows.h"
#undef LDMKIT_TARGET
}  // namespace avx512
#endif

struct Variant {
  decltype(&baseline::forward) forward;
  decltype(&baseline::backward) backward;
};

Variant pick() {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::avx512_bf16:
    case InstructionSet::avx512: return {avx512::forward, avx512::backward};
    case InstructionSet::avx2: return {avx2::forward, avx2::backward};
    case InstructionSet::baseline: break;
  }
#endif
  return {baseline::forward, baseline::backward};
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
