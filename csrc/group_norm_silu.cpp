// GroupNorm and SiLU for the CPU: forward and backward over the parts that group_norm_silu_plan.h cuts. The cut follows the
// shape of one image and the parts' sums are added in a fixed order, so neither the number of threads nor of images changes a
// bit.
#include "group_norm_silu.h"

#include <cmath>

#include "group_norm_silu_plan.h"

namespace ldmkit {
namespace {

using namespace group_norm;

// With such an rstd, squares and their sums stay among the floats. Other groups, and NaN, go the exact way.
constexpr double kSane = 1e12;
bool is_sane(double rstd) { return rstd >= 1.0 / kSane && rstd <= kSane; }

// Beside numbers of this size, subnormal ones are 0.
constexpr double kOrdinary = 0x1p-60;

// Adds the other parts' `count` sums to those of the first; parts are `stride` apart.
void fold(double* sums, int64_t count, int64_t parts, int64_t stride) {
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t i = 0; i < count; ++i) sums[i] += sums[part * stride + i];
  }
}

// By channel: the images' sums, `stride` apart, in order.
template <class T>
void add_images(const GroupNormSilu& call, const double* sums, int64_t stride, T* to) {
  for (int64_t c = 0; c < call.channels; ++c) {
    double sum = 0;
    for (int64_t n = 0; n < call.images; ++n) sum += sums[n * stride + c];
    assign(to[c], sum);
  }
}

// visit(group) for the groups that floats cannot do.
template <class T, class Visit>
void for_each_other(const Plan<T>& plan, const Threads& threads, const Visit& visit) {
  if (std::find(plan.sane.begin(), plan.sane.end(), 0) == plan.sane.end()) return;
  threads.run(static_cast<int64_t>(plan.sane.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      if (!plan.sane[group]) visit(group);
    }
  });
}

// One group, all of it. T is what tensors hold, S what mean and rstd are kept in.
template <class T, class Parameter, class S>
void exact_forward(const GroupNormSilu& call, const ExactGroup<T, Parameter>& exact, int64_t group, T* y, S* mean, S* rstd) {
  const Statistics of = exact.statistics(call.eps);
  exact.normalise(of, group_of(call, y, call.channels * call.spatial, group));
  mean[group] = static_cast<S>(of.mean);
  rstd[group] = static_cast<S>(of.rstd);
}
template <class T, class Parameter, class S>
void exact_backward(const GroupNormSilu& call, const ExactGroup<T, Parameter>& exact, int64_t group, const T* grad,
                    int64_t grad_image, const S* mean, const S* rstd, T* grad_x, double* grad_weight, double* grad_bias,
                    T* grad_shift) {
  exact.gradients({mean[group], rstd[group]}, group_of(call, grad, grad_image, group),
                  group_of(call, grad_x, call.channels * call.spatial, group), grad_weight, grad_bias,
                  grad_shift + group * (call.channels / call.groups));
}

// use(a value of the dtype, a value of mean's and rstd's)
template <class Use>
void with_type(Dtype dtype, const Use& use) {
  switch (dtype) {
    case Dtype::f32: return use(float{}, float{});
    case Dtype::f64: return use(double{}, double{});
    case Dtype::f16: return use(Half{}, float{});
    case Dtype::bf16: return use(BFloat16{}, float{});
  }
}

// ------------------------------------------------------------------------------------------------------------------ forward

template <class T>
void forward(const GroupNormSilu& call, T* y, float* mean, float* rstd, const Threads& threads) {
  Plan<T> plan(call);
  const Cut& cut = plan.cut;
  const int64_t stride = plan.planes ? cut.items : call.images * plan.stride;  // by item in planes, by channel in rows
  const double size = static_cast<double>(plan.group_channels) * static_cast<double>(plan.pixels);
  const int64_t parts = plan.planes ? cut.parts() : cut.pieces;
  std::vector<float> pivot(stride);
  std::vector<double> sum(stride * parts), square(sum.size());
  const auto place = [&](int64_t item) { return plan.planes ? item : item * plan.stride; };

  // Any of a group's values is a pivot; it is its first.
  const auto prepare = [&](int64_t item) {
    const Part<T> part = plan.item(item);
    const float* shift = plan.of(item).shift;
    float* to = pivot.data() + place(item);
    for (int64_t c = 0; c < part.channels; c += plan.group_channels) {
      const double first = value_of(part.x[c]) + (part.residual ? value_of(part.residual[c]) : 0.0) + (shift ? shift[c] : 0.0);
      std::fill_n(to + c, plan.planes ? 1 : plan.group_channels, static_cast<float>(first));
    }
  };
  const auto read = [&](int64_t item, int64_t i, float*) {
    Part<T> part = plan.part(item, i);
    const int64_t at = place(item), to = (plan.planes ? i : i % cut.pieces) * stride + at;
    if (!plan.planes) return loops<T>(false).row_moments(part, plan.of(item).shift, &pivot[at], &sum[to], &square[to]);
    if (!call.shift) {  // one channel then, of all the pixels
      part.begin += part.first * part.pixels;
      part.end += (part.last - 1) * part.pixels;
      part.first = 0, part.last = 1;
    }
    loops<T>(false).plane_moments(part, plan.of(item).shift, pivot[at], &sum[to], &square[to]);
  };
  const auto finish_group = [&](int64_t item, int64_t group, int64_t c, double of_sum, double of_square, double from) {
    const double distance = of_sum / size, variance = std::max(of_square / size - distance * distance, 0.0);
    const Statistics of{from + distance, 1.0 / std::sqrt(variance + call.eps)};
    plan.sane[group] = is_sane(of.rstd);
    mean[group] = static_cast<float>(of.mean);
    rstd[group] = static_cast<float>(of.rstd);
    const Channels k = plan.of(item);
    double largest = 0;
    for (const int64_t end = c + plan.group_channels; c < end; ++c) {
      k.set_affine(c, of.mean, of.rstd);
      largest = std::max({largest, std::abs(k.k_scale[c] * std::sqrt(variance)), std::abs(double{k.k_bias[c]})});
    }
    plan.flush[group] = largest > kOrdinary;
  };
  const auto finish = [&](int64_t item) {
    const int64_t at = place(item), each = plan.planes ? 1 : plan.group_channels, count = plan.planes ? 1 : plan.channels;
    fold(&sum[at], count, parts, stride);
    fold(&square[at], count, parts, stride);
    for (int64_t g = 0; g < count / each; ++g) {
      double of_sum = 0, of_square = 0;
      for (int64_t i = at + g * each; i < at + (g + 1) * each; ++i) of_sum += sum[i], of_square += square[i];
      finish_group(item, plan.first_group(item) + g, g * plan.group_channels, of_sum, of_square, pivot[at + g * each]);
    }
  };
  const auto write = [&](int64_t item, int64_t i, float*) {
    const Loops<T>& run = loops<T>(plan.flushes(item));
    const auto normalise = plan.planes ? run.plane_normalise : run.row_normalise;
    normalise(plan.part(item, i), plan.of(item).coefficients(), plan.dense(y, item), call.silu, plan.stream);
  };
  if (plan.vectors) two_passes(threads, cut, sizeof(T), false, prepare, read, finish, write);
  for_each_other(plan, threads, [&](int64_t group) { exact_forward(call, plan.exact(group), group, y, mean, rstd); });
}

// ------------------------------------------------------------------------------------------------------------------ backward

template <class T>
void backward(const GroupNormSilu& call, const T* grad, int64_t grad_image, const float* mean, const float* rstd, T* grad_x,
              T* grad_weight, T* grad_bias, T* grad_shift, const Threads& threads) {
  Plan<T> plan(call);
  const Cut& cut = plan.cut;
  const double pixels = static_cast<double>(plan.pixels), size = static_cast<double>(plan.group_channels) * pixels;
  const int64_t stride = call.images * plan.stride;  // by channel of every image, and by piece of its pixels
  std::vector<double> dz(stride * cut.pieces), dz_t(dz.size()), t(dz.size());
  const auto place = [&](int64_t item) { return plan.image(item) * plan.stride + plan.first_channel(item); };

  const auto prepare = [&](int64_t item) {
    const Channels k = plan.of(item);
    for (int64_t group = plan.first_group(item), c = 0; group < plan.end_group(item); ++group) {
      plan.sane[group] = is_sane(rstd[group]);
      for (const int64_t end = c + plan.group_channels; c < end; ++c) k.set_affine(c, mean[group], rstd[group]);
    }
  };
  const auto read = [&](int64_t item, int64_t i, float* kept) {
    const int64_t to = i % cut.pieces * stride + place(item);
    const auto sums = plan.planes ? loops<T>(false).plane_sums : loops<T>(false).row_sums;
    sums(plan.part(item, i), plan.at(grad, grad_image, item), plan.of(item).coefficients(), call.silu,
         {&dz[to], &dz_t[to], &t[to]}, kept);
  };
  // With xhat = (h - mean) rstd, and means over the group: dh = rstd (weight dz - mean(weight dz) - xhat mean(weight dz xhat)).
  // The mean is a rounded one, so xhat's own mean is not quite 0: it is taken out. A channel's sum of dh is shift's gradient.
  const auto finish_group = [&](int64_t item, int64_t group, int64_t c0) {
    const int64_t at = place(item), end = c0 + plan.group_channels;
    const Channels k = plan.of(item);
    T* to_shift = grad_shift + plan.image(item) * plan.channels + plan.first_channel(item);
    const double inverse = rstd[group];
    double centre = 0, constant = 0, slope = 0, largest = 0;
    for (int64_t c = c0; c < end; ++c) {
      const double rest = k.rest(c, mean[group]);
      dz_t[at + c] += rest * dz[at + c];
      t[at + c] += rest * pixels;
      centre += t[at + c] / size;
    }
    for (int64_t c = c0; c < end; ++c) {
      const double weight = k.weight[c];
      dz_t[at + c] = inverse * (dz_t[at + c] - centre * dz[at + c]);  // weight's gradient
      constant += weight * dz[at + c] / size;
      slope += weight * dz_t[at + c] / size;
      largest = std::max({largest, std::abs(weight * inverse * dz[at + c]), std::abs(weight * inverse * dz_t[at + c])});
    }
    const double t_slope = -inverse * inverse * slope;
    for (int64_t c = c0; c < end; ++c) {
      const double rest = k.rest(c, mean[group]), weight = k.weight[c];
      k.k_slope[c] = static_cast<float>(t_slope);
      k.k_constant[c] = static_cast<float>(-inverse * constant - t_slope * (centre - rest));
      const double of_shift = inverse * (weight * dz[at + c] - pixels * constant) + t_slope * (t[at + c] - centre * pixels);
      assign(to_shift[c], of_shift);
    }
    plan.flush[group] = largest / size > kOrdinary;
  };
  const auto finish = [&](int64_t item) {
    for (std::vector<double>* sums : {&dz, &dz_t, &t}) fold(sums->data() + place(item), cut.item_channels, cut.pieces, stride);
    for (int64_t g = 0; g < cut.item_channels / plan.group_channels; ++g) {
      finish_group(item, plan.first_group(item) + g, g * plan.group_channels);
    }
  };
  const auto write = [&](int64_t item, int64_t i, const float* kept) {
    const Loops<T>& run = loops<T>(plan.flushes(item));
    const auto gradient = plan.planes ? run.plane_gradient : run.row_gradient;
    gradient(plan.part(item, i), plan.at(grad, grad_image, item), kept, plan.of(item).coefficients(), plan.dense(grad_x, item),
             call.silu, plan.stream);
  };
  if (plan.vectors) two_passes(threads, cut, 2 * sizeof(T), call.silu, prepare, read, finish, write);
  for_each_other(plan, threads, [&](int64_t group) {
    const int64_t at =
        place(plan.planes ? group : group / call.groups) + (plan.planes ? 0 : group % call.groups * plan.group_channels);
    exact_backward(call, plan.exact(group), group, grad, grad_image, mean, rstd, grad_x, &dz_t[at], &dz[at], grad_shift);
  });
  add_images(call, dz_t.data(), plan.stride, grad_weight);
  add_images(call, dz.data(), plan.stride, grad_bias);
}

// ------------------------------------------------------------------------------------------------------------------ float64

ExactGroup<double, double> group_of_doubles(const GroupNormSilu& call, int64_t group) {
  const auto doubles = [](const void* data) { return static_cast<const double*>(data); };
  return exact_group<double>(call, doubles(call.weight), doubles(call.bias), doubles(call.shift), call.channels, group);
}

void forward(const GroupNormSilu& call, double* y, double* mean, double* rstd, const Threads& threads) {
  threads.run(call.images * call.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) exact_forward(call, group_of_doubles(call, group), group, y, mean, rstd);
  });
}

void backward(const GroupNormSilu& call, const double* grad, int64_t grad_image, const double* mean, const double* rstd,
              double* grad_x, double* grad_weight, double* grad_bias, double* grad_shift, const Threads& threads) {
  const int64_t channels = call.channels / call.groups;
  std::vector<double> of_weight(call.images * call.channels), of_bias(of_weight.size());
  threads.run(call.images * call.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      exact_backward(call, group_of_doubles(call, group), group, grad, grad_image, mean, rstd, grad_x,
                     &of_weight[group * channels], &of_bias[group * channels], grad_shift);
    }
  });
  add_images(call, of_weight.data(), call.channels, grad_weight);
  add_images(call, of_bias.data(), call.channels, grad_bias);
}

}  // namespace

void group_norm_silu_forward_cpu(const GroupNormSilu& call, void* y, void* mean, void* rstd, const Threads& threads) {
  with_type(call.dtype, [&](auto type, auto statistic) {
    using T = decltype(type);
    using S = decltype(statistic);
    forward(call, static_cast<T*>(y), static_cast<S*>(mean), static_cast<S*>(rstd), threads);
  });
}

void group_norm_silu_backward_cpu(const GroupNormSilu& call, const void* grad, int64_t grad_image, const void* mean,
                                  const void* rstd, void* grad_x, void* grad_weight, void* grad_bias, void* grad_shift,
                                  const Threads& threads) {
  with_type(call.dtype, [&](auto type, auto statistic) {
    using T = decltype(type);
    using S = decltype(statistic);
    backward(call, static_cast<const T*>(grad), grad_image, static_cast<const S*>(mean), static_cast<const S*>(rstd),
             static_cast<T*>(grad_x), static_cast<T*>(grad_weight), static_cast<T*>(grad_bias), static_cast<T*>(grad_shift),
             threads);
  });
}

}  // namespace ldmkit
