// GroupNorm and SiLU of one group, element by element, in float64 with sums in long double. For float64 tensors; and for groups
// of other dtypes whose values floats cannot square: it is slow there, but right.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "vector.h"

namespace ldmkit::group_norm {

inline double value_of(double x) { return x; }
inline double value_of(float x) { return x; }
inline double value_of(Half x) { return load<1>(&x)[0]; }
inline double value_of(BFloat16 x) { return load<1>(&x)[0]; }

inline void assign(double& to, double value) { to = value; }
inline void assign(float& to, double value) { to = static_cast<float>(value); }
template <class T>
void assign(T& to, double value) {
  store<1>(&to, Vec<1>::F{static_cast<float>(value)});
}

struct Statistics {
  double mean, rstd;
};

// Pointers are to the group's first element, or the first of its channels. All but x may be null.
template <class T, class Parameter>
struct ExactGroup {
  const T *x, *residual;
  const Parameter *weight, *bias, *shift;
  int64_t channels, pixels, channel_stride, pixel_stride;
  bool silu;

  double size() const { return static_cast<double>(channels) * static_cast<double>(pixels); }
  double weight_of(int64_t c) const { return weight ? weight[c] : 1.0; }
  double bias_of(int64_t c) const { return bias ? bias[c] : 0.0; }

  // visit(c, i, h) for every element: its channel, its place in memory, its value.
  template <class Visit>
  void for_each(const Visit& visit) const {
    for (int64_t c = 0; c < channels; ++c) {
      const double added = shift ? shift[c] : 0.0;
      for (int64_t p = 0; p < pixels; ++p) {
        const int64_t i = c * channel_stride + p * pixel_stride;
        visit(c, i, value_of(x[i]) + added + (residual ? value_of(residual[i]) : 0.0));
      }
    }
  }

  Statistics statistics(double eps) const {
    long double sum = 0, square = 0;
    for_each([&](int64_t, int64_t, double h) { sum += h; });
    const long double mean = sum / size();
    for_each([&](int64_t, int64_t, double h) { square += (h - mean) * (h - mean); });
    return {static_cast<double>(mean), static_cast<double>(1.0L / std::sqrt(square / size() + eps))};
  }

  void normalise(const Statistics& of, T* y) const {
    for_each([&](int64_t c, int64_t i, double h) {
      const double z = (h - of.mean) * of.rstd * weight_of(c) + bias_of(c);
      assign(y[i], silu ? z / (1.0 + std::exp(-z)) : z);
    });
  }

  // dz, the gradient where SiLU's argument is.
  double inner(double grad, double xhat, int64_t c) const {
    if (!silu) return grad;
    const double z = xhat * weight_of(c) + bias_of(c), s = 1.0 / (1.0 + std::exp(-z));
    return grad * (s * (1.0 + z * (1.0 - s)));
  }

  // Writes h's gradient, and per channel those of weight, bias and shift. xhat's own mean, which is not 0 where the mean was
  // rounded, is taken out again.
  void gradients(const Statistics& of, const T* grad, T* grad_x, double* grad_weight, double* grad_bias, T* grad_shift) const {
    struct Sums {
      long double dz = 0, dz_xhat = 0, xhat = 0;
    };
    std::vector<Sums> sums(channels);
    const auto normal = [&](double h) { return (h - of.mean) * of.rstd; };
    for_each([&](int64_t c, int64_t i, double h) {
      const double dz = inner(value_of(grad[i]), normal(h), c);
      sums[c].dz += dz, sums[c].dz_xhat += dz * normal(h), sums[c].xhat += normal(h);
    });
    long double centre = 0, constant = 0, slope = 0;
    for (const Sums& s : sums) centre += s.xhat / size();
    for (int64_t c = 0; c < channels; ++c) {
      sums[c].dz_xhat -= centre * sums[c].dz;
      constant += weight_of(c) * sums[c].dz / size();
      slope += weight_of(c) * sums[c].dz_xhat / size();
    }
    for (int64_t c = 0; c < channels; ++c) {
      grad_weight[c] = static_cast<double>(sums[c].dz_xhat);
      grad_bias[c] = static_cast<double>(sums[c].dz);
      const long double others = pixels * constant + slope * (sums[c].xhat - centre * pixels);
      assign(grad_shift[c], static_cast<double>(of.rstd * (weight_of(c) * sums[c].dz - others)));
    }
    for_each([&](int64_t c, int64_t i, double h) {
      const long double dz = inner(value_of(grad[i]), normal(h), c);
      assign(grad_x[i], static_cast<double>(of.rstd * (weight_of(c) * dz - constant - (normal(h) - centre) * slope)));
    });
  }
};

}  // namespace ldmkit::group_norm
