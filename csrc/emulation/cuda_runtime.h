// What ldmkit's kernels use of CUDA's header of the same name, for the host. Lane and thread functions are in warp_functions.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

using cudaError_t = int;
using cudaStream_t = void*;
inline const char* cudaGetErrorString(int code) { return ldmkit_emulation_error(code); }

#define LDMKIT_VECTORS(T, name, align2, align4)                                           \
  struct alignas(align2) name##2 { T x, y; };                                             \
  struct name##3 { T x, y, z; };                                                          \
  struct alignas(align4) name##4 { T x, y, z, w; };                                       \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                              \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                      \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
LDMKIT_VECTORS(int, int, 8, 16)
LDMKIT_VECTORS(float, float, 8, 16)
LDMKIT_VECTORS(double, double, 16, 16)
#undef LDMKIT_VECTORS
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

constexpr int warpSize = 32;

// Memory: caching hints do nothing, and a thread sees all writes of those that ran before it.
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
template <class T>
void __stcg(T* to, T value) {
  *to = value;
}
inline void __threadfence() { ldmkit::emulation::fence(); }
inline void __threadfence_block() {}

// Arithmetic. glibc has declarations of its own for some of these names, hence macros.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __fdividef(x, y) ((x) / (y))
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

#define LDMKIT_MIN_MAX(T)                               \
  inline T min(T x, T y) { return y < x ? y : x; }      \
  inline T max(T x, T y) { return x < y ? y : x; }
LDMKIT_MIN_MAX(int)
LDMKIT_MIN_MAX(unsigned)
LDMKIT_MIN_MAX(long)
LDMKIT_MIN_MAX(unsigned long)
LDMKIT_MIN_MAX(long long)
LDMKIT_MIN_MAX(unsigned long long)
#undef LDMKIT_MIN_MAX
inline float min(float x, float y) { return std::fmin(x, y); }
inline float max(float x, float y) { return std::fmax(x, y); }
inline double min(double x, double y) { return std::fmin(x, y); }
inline double max(double x, double y) { return std::fmax(x, y); }

namespace ldmkit::emulation {
template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace ldmkit::emulation
inline unsigned __float_as_uint(float x) { return ldmkit::emulation::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return ldmkit::emulation::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return ldmkit::emulation::bit_cast<float>(x); }
inline float __int_as_float(int x) { return ldmkit::emulation::bit_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

#include "warp_functions.h"
