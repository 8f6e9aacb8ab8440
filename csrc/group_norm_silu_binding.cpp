#include "binding.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "group_norm_silu.h"
#include "large_output.h"

namespace ldmkit {
namespace {

using Optional = std::optional<at::Tensor>;

// As memory_format_of in ldmkit/kernels/layout.py: channels_last where channels are neighbours and x is not plainly contiguous.
at::MemoryFormat format_of(const at::Tensor& x) {
  if ((x.dim() == 4 || x.dim() == 5) && x.size(1) > 1 && x.stride(1) == 1 && !x.is_contiguous())
    return x.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
  return at::MemoryFormat::Contiguous;
}

// The tensor where each image is dense in this format, whatever lies between images; else a copy that is.
at::Tensor dense_images(const at::Tensor& x, at::MemoryFormat format) {
  int64_t expected = 1;
  bool dense = true;
  const auto check = [&](int64_t dim) {
    dense &= x.size(dim) == 1 || x.stride(dim) == expected;
    expected *= x.size(dim);
  };
  if (format != at::MemoryFormat::Contiguous) check(1);
  for (int64_t dim = x.dim() - 1; dim > 1; --dim) check(dim);
  if (format == at::MemoryFormat::Contiguous) check(1);
  return dense ? x : x.contiguous(format);
}

int64_t between_images(const at::Tensor& x) { return x.size(0) > 1 ? x.stride(0) : x.numel(); }

Optional dense(const Optional& tensor) { return tensor.has_value() ? Optional(tensor->contiguous()) : std::nullopt; }

// The arguments as the kernels take them; keeps what was copied alive.
struct Prepared {
  at::MemoryFormat format;
  at::Tensor x;
  Optional weight, bias, shift, residual;
  GroupNormSilu call;

  Prepared(const at::Tensor& given, int64_t groups, const Optional& weight, const Optional& bias, double eps, bool silu,
           const Optional& shift, const Optional& residual)
      : format(format_of(given)),
        x(dense_images(given, format)),
        weight(dense(weight)),
        bias(dense(bias)),
        shift(dense(shift)) {
    const int64_t images = x.size(0), channels = x.size(1);
    TORCH_CHECK(groups > 0 && channels % groups == 0, "group_norm_silu: ", channels, " channels in ", groups, " groups");
    const auto fits = [&](const Optional& t, at::IntArrayRef shape, const char* name) {
      TORCH_CHECK(!t.has_value() || (t->sizes() == shape && t->scalar_type() == x.scalar_type() && t->device() == x.device()),
                  "group_norm_silu: ", name, " does not fit x");
    };
    fits(weight, {channels}, "weight");
    fits(bias, {channels}, "bias");
    fits(shift, {images, channels}, "shift");
    fits(residual, x.sizes(), "residual");
    if (residual.has_value()) this->residual = dense_images(*residual, format);
    const int64_t spatial = x.numel() == 0 ? 0 : x.numel() / (images * channels);
    call = {dtype_of(x),
            images,
            channels,
            groups,
            spatial,
            format != at::MemoryFormat::Contiguous,
            silu,
            eps,
            x.const_data_ptr(),
            data_or_null(this->residual),
            data_or_null(this->weight),
            data_or_null(this->bias),
            data_or_null(this->shift),
            between_images(x),
            this->residual.has_value() ? between_images(*this->residual) : 0};
  }

  at::TensorOptions statistics() const { return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat); }
};

void check_backward(const Prepared& prepared, const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                    const at::Tensor& rstd) {
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() && grad.device() == x.device(),
              "group_norm_silu: the incoming gradient does not fit x");
  for (const auto& t : {mean, rstd})
    TORCH_CHECK(t.sizes() == at::IntArrayRef({x.size(0), prepared.call.groups}) && t.dtype() == prepared.statistics().dtype() &&
                    t.device() == x.device(),
                "group_norm_silu: the saved statistics do not fit x");
}

#ifndef LDMKIT_EMULATION

Threads torch_threads() {
  return {at::get_num_threads(), [](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work) {
            at::parallel_for(0, count, grain, work);
          }};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_cpu(const at::Tensor& x, int64_t groups, const Optional& weight,
                                                           const Optional& bias, double eps, bool silu, const Optional& shift,
                                                           const Optional& residual) {
  const Prepared prepared(x, groups, weight, bias, eps, silu, shift, residual);
  const at::Tensor y = at::empty_like(x, prepared.format);
  if (y.numel() == 0)
    return {y, at::zeros({x.size(0), groups}, prepared.statistics()), at::zeros({x.size(0), groups}, prepared.statistics())};
  const at::Tensor mean = at::empty({x.size(0), groups}, prepared.statistics()), rstd = at::empty_like(mean);
  ask_for_huge_pages(y.mutable_data_ptr(), y.nbytes());
  group_norm_silu_forward_cpu(prepared.call, y.data_ptr(), mean.data_ptr(), rstd.data_ptr(), torch_threads());
  return {y, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_cpu(const at::Tensor& grad, const at::Tensor& x,
                                                                        int64_t groups, const Optional& weight,
                                                                        const Optional& bias, bool silu, const Optional& shift,
                                                                        const Optional& residual, const at::Tensor& mean,
                                                                        const at::Tensor& rstd) {
  const Prepared prepared(x, groups, weight, bias, 0, silu, shift, residual);
  check_backward(prepared, grad, x, mean, rstd);
  const at::Tensor grad_x = at::empty_like(x, prepared.format);
  if (x.numel() == 0)
    return {grad_x, at::zeros({x.size(1)}, x.options()), at::zeros({x.size(1)}, x.options()),
            at::zeros({x.size(0), x.size(1)}, x.options())};
  const at::Tensor grad_weight = at::empty({x.size(1)}, x.options()), grad_bias = at::empty({x.size(1)}, x.options());
  const at::Tensor grad_shift = at::empty({x.size(0), x.size(1)}, x.options());
  const at::Tensor incoming = dense_images(grad, prepared.format), mean_NG = mean.contiguous(), rstd_NG = rstd.contiguous();
  ask_for_huge_pages(grad_x.mutable_data_ptr(), grad_x.nbytes());
  group_norm_silu_backward_cpu(prepared.call, incoming.const_data_ptr(), between_images(incoming), mean_NG.const_data_ptr(),
                               rstd_NG.const_data_ptr(), grad_x.data_ptr(), grad_weight.data_ptr(), grad_bias.data_ptr(),
                               grad_shift.data_ptr(), torch_threads());
  return {grad_x, grad_weight, grad_bias, grad_shift};
}

LDMKIT_BIND {
  module.def("group_norm_silu_forward_cpu", &forward_cpu, Unlocked());
  module.def("group_norm_silu_backward_cpu", &backward_cpu, Unlocked());
}

#endif

}  // namespace
}  // namespace ldmkit

#ifdef LDMKIT_DEVICE

namespace ldmkit::device {
namespace {

at::Tensor workspace_for(const Prepared& prepared, bool backward) {
  return at::empty({group_norm_silu_workspace(prepared.call, backward)}, prepared.x.options().dtype(at::kByte));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_cuda(const at::Tensor& x, int64_t groups, const Optional& weight,
                                                            const Optional& bias, double eps, bool silu, const Optional& shift,
                                                            const Optional& residual) {
  const Launch launch(x);
  const Prepared prepared(x, groups, weight, bias, eps, silu, shift, residual);
  const at::Tensor y = at::empty_like(x, prepared.format);
  if (y.numel() == 0)
    return {y, at::zeros({x.size(0), groups}, prepared.statistics()), at::zeros({x.size(0), groups}, prepared.statistics())};
  const at::Tensor mean = at::empty({x.size(0), groups}, prepared.statistics()), rstd = at::empty_like(mean);
  const at::Tensor workspace = workspace_for(prepared, false);
  check_launch(group_norm_silu_forward_cuda(prepared.call, y.data_ptr(), mean.data_ptr(), rstd.data_ptr(), workspace.data_ptr(),
                                            launch.stream));
  return {y, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_cuda(const at::Tensor& grad, const at::Tensor& x,
                                                                         int64_t groups, const Optional& weight,
                                                                         const Optional& bias, bool silu, const Optional& shift,
                                                                         const Optional& residual, const at::Tensor& mean,
                                                                         const at::Tensor& rstd) {
  const Launch launch(x);
  const Prepared prepared(x, groups, weight, bias, 0, silu, shift, residual);
  check_backward(prepared, grad, x, mean, rstd);
  const at::Tensor grad_x = at::empty_like(x, prepared.format);
  if (x.numel() == 0)
    return {grad_x, at::zeros({x.size(1)}, x.options()), at::zeros({x.size(1)}, x.options()),
            at::zeros({x.size(0), x.size(1)}, x.options())};
  const at::Tensor grad_weight = at::empty({x.size(1)}, x.options()), grad_bias = at::empty({x.size(1)}, x.options());
  const at::Tensor grad_shift = at::empty({x.size(0), x.size(1)}, x.options()), workspace = workspace_for(prepared, true);
  const at::Tensor incoming = dense_images(grad, prepared.format), mean_NG = mean.contiguous(), rstd_NG = rstd.contiguous();
  check_launch(group_norm_silu_backward_cuda(prepared.call, incoming.const_data_ptr(), between_images(incoming),
                                             mean_NG.const_data_ptr(), rstd_NG.const_data_ptr(), grad_x.data_ptr(),
                                             grad_weight.data_ptr(), grad_bias.data_ptr(), grad_shift.data_ptr(),
                                             workspace.data_ptr(), launch.stream));
  return {grad_x, grad_weight, grad_bias, grad_shift};
}

LDMKIT_BIND {
  module.def("group_norm_silu_forward_cuda", &forward_cuda, Unlocked());
  module.def("group_norm_silu_backward_cuda", &backward_cuda, Unlocked());
}

}  // namespace
}  // namespace ldmkit::device

#endif
