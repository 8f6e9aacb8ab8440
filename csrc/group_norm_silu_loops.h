// The vectorised loops of GroupNorm and SiLU for the CPU, over planes (NCHW: a channel's pixels are adjacent) and over rows
// (channels_last: a pixel's channels are). They run on a part of one group or image; group_norm_silu.cpp says which, on what
// thread.
#pragma once

#include <cstdint>

#include "vector.h"

namespace ldmkit::group_norm {

constexpr int64_t kRun = 16;  // pixels of a plane, or channels of a row, that there must be at least
constexpr int64_t kPad =
    16;  // loops over rows may read and write floats and doubles up to the next multiple of it behind a channel

// Pixels [begin, end) of channels [first, last), of a group in planes or of an image in rows; pointers are to its first
// element. residual may be null.
template <class T>
struct Part {
  const T *x, *residual;
  int64_t channels, pixels, begin, end, first, last;
};

// By channel: with t = x + residual + offset, offset = shift - mean and scale = weight * rstd, SiLU's argument z = t * scale +
// bias; and the gradient of h = x + shift + residual is dz * scale + t * slope + constant.
struct Coefficients {
  const float *offset, *scale, *bias, *slope, *constant;
};

// By channel, over pixels.
struct Sums {
  double *dz, *dz_t, *t;
};

// `stream` writes past the caches, for what is too large to be found there again.
template <class T>
struct Loops {
  // Adds to the sums of h - pivot and (h - pivot)^2. `shift` is by channel, or null; then, a part is best given as one channel.
  void (*plane_moments)(const Part<T>& part, const float* shift, float pivot, double* sum, double* square);
  // The same by channel; so is the pivot.
  void (*row_moments)(const Part<T>& part, const float* shift, const float* pivot, double* sum, double* square);
  // Writes y.
  void (*plane_normalise)(const Part<T>& part, const Coefficients& k, T* y, bool silu, bool stream);
  void (*row_normalise)(const Part<T>& part, const Coefficients& k, T* y, bool silu, bool stream);
  // Adds to the sums that gradients are made of. Writes dz, an element's place being its place in x, unless `kept` is null.
  void (*plane_sums)(const Part<T>& part, const T* grad, const Coefficients& k, bool silu, const Sums& to, float* kept);
  void (*row_sums)(const Part<T>& part, const T* grad, const Coefficients& k, bool silu, const Sums& to, float* kept);
  // Writes the gradient of h. Computes dz again where `kept` is null.
  void (*plane_gradient)(const Part<T>& part, const T* grad, const float* kept, const Coefficients& k, T* grad_x, bool silu,
                         bool stream);
  void (*row_gradient)(const Part<T>& part, const T* grad, const float* kept, const Coefficients& k, T* grad_x, bool silu,
                       bool stream);
};

// For this processor. With `flush`, `normalise` and `gradient` may write 0 for subnormal numbers, as AVX512_BF16 rounds. T is
// float, Half or BFloat16.
template <class T>
const Loops<T>& loops(bool flush);

}  // namespace ldmkit::group_norm
