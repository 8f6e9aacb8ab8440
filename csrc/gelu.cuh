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
  } else {
    // 1 - Phi(a) for a = |x| is exp(-a^2 / 2) R(a), with a minimax fit to R in t = 1 / (1 + p a).
    float tail, exponential;
    if constexpr (sizeof(T) == 4) {  // to 2^-24.8 of R
      const float a = fminf(fabsf(x), 15.0f), t = __fdividef(1.0f, fmaf(0.34f, a, 1.0f));  // 1 - Phi(15) is 0 in fp32
      float r = fmaf(t, -0.025876503437757492f, 0.13835732638835907f);
      r = fmaf(r, t, -0.27087146043777466f);
      r = fmaf(r, t, 0.1997179090976715f);
      r = fmaf(r, t, -0.043106406927108765f);
      r = fmaf(r, t, 0.11471360921859741f);
      r = fmaf(r, t, 0.11535170674324036f);
      r = fmaf(r, t, 0.13609223067760468f);
      r = fmaf(r, t, 0.135621577501297f);
      // a^2 / 2 = s + d exactly; s = k ln 2 + f, where k times the first part of ln 2 is exact.
      const float half = 0.5f * a, s = half * a, d = fmaf(half, a, -s), k = rintf(s * 1.4426950408889634f);
      const float f = fmaf(k, 2.12194440e-4f, fmaf(k, -0.693359375f, s)) + d;
      exponential = fast_exp2(f * -1.4426950408889634f) * fast_exp2(-k);
      tail = r * t * exponential;
    } else {  // to 2^-14.8 of R, in about 20 instructions, so that arithmetic stays behind memory on every GPU
      const float t = __fdividef(1.0f, fmaf(0.38f, fabsf(x), 1.0f));
      float r = fmaf(t, -0.08992831408977509f, 0.18887639045715332f);
      r = fmaf(r, t, 0.09197980165481567f);
      r = fmaf(r, t, 0.15782944858074188f);
      r = fmaf(r, t, 0.15122513473033905f);
      exponential = fast_exp2(x * -0.72134752044448170368f * x);
      tail = r * t * exponential;
    }
    return {x < 0.0f ? tail : 1.0f - tail, x * (0.398942280401432677939946f * exponential)};
  }
}

}  // namespace ldmkit
