// What GELU(x) = x Phi(x) and its derivative Phi(x) + x phi(x) are made of, on the GPU; both tails keep their relative accuracy,
// which 1 + erf(x) would lose in the lower one.
#pragma once

#include "common.cuh"

namespace ldmkit {

template <class C>
struct GeluParts {
  C cdf, slope;  // Phi(x), x phi(x)
};

// T is what the result is rounded to.
template <class T>
__device__ inline GeluParts<typename Compute<T>::type> gelu_parts(typename Compute<T>::type x) {
  if constexpr (sizeof(T) == 8) {
    return {0.5 * erfc(x * -0.70710678118654752440), x * (0.398942280401432677939946 * exp(-0.5 * x * x))};
  } else if constexpr (sizeof(T) == 4) {
    return {0.5f * erfcf(x * -0.70710678118654752440f), x * (0.398942280401432677939946f * expf(-0.5f * x * x))};
  } else {
    // 1 - Phi(a) for a = |x| is exp(-a^2 / 2) R(a); a minimax fit to R in t = 1 / (1 + p a), to 2^-14.8 of it. About 20
    // instructions, so that arithmetic stays behind memory on every GPU.
    const float t = __fdividef(1.0f, fmaf(0.38f, fabsf(x), 1.0f));
    float r = fmaf(t, -0.08992831408977509f, 0.18887639045715332f);
    r = fmaf(r, t, 0.09197980165481567f);
    r = fmaf(r, t, 0.15782944858074188f);
    r = fmaf(r, t, 0.15122513473033905f);
    const float exponential = fast_exp2(x * -0.72134752044448170368f * x);
    const float tail = r * t * exponential;
    return {x < 0.0f ? tail : 1.0f - tail, x * (0.398942280401432677939946f * exponential)};
  }
}

}  // namespace ldmkit
