// __half for the host: storage and conversions. Kernels compute in fp32.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float value) : bits(ldmkit::emulation::float_to_half(value)) {}
  operator float() const { return ldmkit::emulation::half_to_float(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline __half __float2half(float value) { return value; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 pair) { return {pair.x, pair.y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
inline float __low2float(__half2 pair) { return pair.x; }
inline float __high2float(__half2 pair) { return pair.y; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return ldmkit::emulation::bit_cast<__half>(bits); }
