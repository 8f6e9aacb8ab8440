#include "binding.h"

#ifdef LDMKIT_DEVICE

#include <limits>

#include "cross_attention_device.h"

namespace ldmkit::device {
namespace {

constexpr int64_t kEight = 8;

// (B, H, rows, D) whose memory is a dense (B, rows, H, D).
at::Tensor heads_inside(const at::Tensor& like) {
  return at::empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.options()).transpose(1, 2);
}

// From one to the next, 0 where there is one.
int64_t step(const at::Tensor& tensor, int64_t dim) { return tensor.size(dim) == 1 ? 0 : tensor.stride(dim); }

// Rows as the kernels read them: in 16 bits, from multiples of 16 bytes on and a multiple of 8 long. A view where they are,
// else a copy, padded with zeros.
at::Tensor as_rows(const at::Tensor& tensor) {
  const int64_t bytes = tensor.element_size(), width = tensor.size(3);
  if (bytes > 2) return width == 1 || tensor.stride(3) == 1 ? tensor : tensor.contiguous();
  const int64_t padded = (width + kEight - 1) / kEight * kEight;
  bool fits = width == padded && tensor.stride(3) == 1 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim < 3; ++dim) fits = fits && step(tensor, dim) * bytes % 16 == 0;
  if (fits) return tensor;
  at::Tensor rows = at::empty({tensor.size(0), tensor.size(1), tensor.size(2), padded}, tensor.options());
  rows.narrow(3, 0, width).copy_(tensor);
  if (padded > width) rows.narrow(3, width, padded - width).zero_();
  return rows;
}

DeviceRows view_of(const at::Tensor& rows) { return {rows.const_data_ptr(), step(rows, 0), step(rows, 1), step(rows, 2)}; }

// A mask, and what must live as long as its pointers.
struct Mask {
  at::Tensor values, hidden;
  DeviceMask view = {};

  Mask(const std::optional<at::Tensor>& mask, int64_t keys) {
    if (!mask.has_value() || keys == 0) return;
    const bool dense = mask->size(3) == keys && (keys == 1 || mask->stride(3) == 1);
    values = dense ? *mask : mask->expand({-1, -1, -1, keys}).contiguous();
    view.additive = values.scalar_type() != at::kBool;
    hidden = (view.additive ? values.eq(-std::numeric_limits<double>::infinity()) : values.logical_not()).all(2).contiguous();
    view.data = values.const_data_ptr();
    view.batch = step(values, 0), view.head = step(values, 1), view.row = step(values, 2);
    view.hidden = static_cast<const uint8_t*>(hidden.const_data_ptr());
    view.hidden_batch = hidden.size(0) == 1 ? 0 : hidden.stride(0);
    view.hidden_head = hidden.size(1) == 1 ? 0 : hidden.stride(1);
  }
};

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && q.size(0) == k.size(0) && q.size(1) == k.size(1) &&
                  q.size(3) == k.size(3) && k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() &&
                  k.device() == q.device() && v.device() == q.device(),
              "cross_attention: q, k and v do not fit one another");
  TORCH_CHECK(q.size(3) <= kAttentionWidest, "cross_attention: head dimensions up to ", kAttentionWidest, " are served, not ",
              q.size(3));
  constexpr int64_t kMost = std::numeric_limits<int>::max() - 1024;  // a row's number, with room for the last tile
  TORCH_CHECK(q.size(2) <= kMost && k.size(2) <= kMost, "cross_attention: up to ", kMost, " queries and keys are served");
  if (!mask.has_value()) return;
  TORCH_CHECK(mask->dim() == 4 && mask->device() == q.device() &&
                  (mask->scalar_type() == at::kBool || mask->scalar_type() == q.scalar_type()),
              "cross_attention: the mask does not fit q");
  const int64_t full[4] = {q.size(0), q.size(1), q.size(2), k.size(2)};
  for (int i = 0; i < 4; ++i) {
    TORCH_CHECK(mask->size(i) == 1 || mask->size(i) == full[i], "cross_attention: the mask does not fit q");
  }
}

DeviceAttention call_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Mask& mask, int64_t width,
                        double scale) {
  return {dtype_of(q), q.size(0), q.size(1),  q.size(2),  k.size(2),  width,
          q.size(3),   scale,     view_of(q), view_of(k), view_of(v), mask.view};
}

std::tuple<at::Tensor, at::Tensor> forward_cuda(const at::Tensor& q_any, const at::Tensor& k_any, const at::Tensor& v_any,
                                                const std::optional<at::Tensor>& mask_any, double scale) {
  check(q_any, k_any, v_any, mask_any);
  const Launch launch(q_any);
  const at::Tensor out = heads_inside(q_any);
  const bool wide = q_any.scalar_type() == at::kDouble;
  const at::Tensor lse =
      at::empty({q_any.size(0), q_any.size(1), q_any.size(2)}, q_any.options().dtype(wide ? at::kDouble : at::kFloat));
  if (out.numel() == 0 || k_any.numel() == 0) {
    return {out.zero_(), lse.fill_(-std::numeric_limits<double>::infinity())};
  }
  const at::Tensor q = as_rows(q_any), k = as_rows(k_any), v = as_rows(v_any);
  const Mask mask(mask_any, k.size(2));
  check_launch(
      attention_forward_cuda(call_of(q, k, v, mask, out.size(3), scale), out.data_ptr(), lse.data_ptr(), launch.stream));
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cuda(const at::Tensor& grad_any,
                                                             const std::optional<at::Tensor>& grad_lse_any,
                                                             const at::Tensor& q_any, const at::Tensor& k_any,
                                                             const at::Tensor& v_any, const std::optional<at::Tensor>& mask_any,
                                                             const at::Tensor& out_any, const at::Tensor& lse_any,
                                                             double scale) {
  check(q_any, k_any, v_any, mask_any);
  const auto like_q = [&](const at::Tensor& t) {
    return t.sizes() == q_any.sizes() && t.scalar_type() == q_any.scalar_type() && t.device() == q_any.device();
  };
  const auto like_lse = [&](const at::Tensor& t) {
    return t.dim() == 3 && t.size(0) == q_any.size(0) && t.size(1) == q_any.size(1) && t.size(2) == q_any.size(2) &&
           t.scalar_type() == (q_any.scalar_type() == at::kDouble ? at::kDouble : at::kFloat) && t.device() == q_any.device();
  };
  TORCH_CHECK(
      like_q(grad_any) && like_q(out_any) && like_lse(lse_any) && (!grad_lse_any.has_value() || like_lse(*grad_lse_any)),
      "cross_attention: the incoming gradients or the saved results do not fit q");
  const Launch launch(q_any);
  const at::Tensor dq = heads_inside(q_any), dk = heads_inside(k_any), dv = heads_inside(v_any);
  if (dq.numel() == 0 || dk.numel() == 0) return {dq.zero_(), dk.zero_(), dv.zero_()};

  const at::Tensor q = as_rows(q_any), k = as_rows(k_any), v = as_rows(v_any), grad = as_rows(grad_any), out = as_rows(out_any);
  const at::Tensor lse = lse_any.contiguous(), grad_lse = grad_lse_any.has_value() ? grad_lse_any->contiguous() : at::Tensor();
  const Mask mask(mask_any, k.size(2));
  const DeviceAttention call = call_of(q, k, v, mask, dq.size(3), scale);
  const at::Tensor delta = at::empty(lse.sizes(), lse.options());
  const at::Tensor partial = at::empty({attention_backward_scratch_cuda(call)}, lse.options());
  const DeviceGradient gradient{view_of(grad), view_of(out), lse.const_data_ptr(),
                                grad_lse.defined() ? grad_lse.const_data_ptr() : nullptr};
  const DeviceGradientOutputs outputs{dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), delta.data_ptr(), partial.data_ptr()};
  check_launch(attention_backward_cuda(call, gradient, outputs, launch.stream));
  return {dq, dk, dv};
}

LDMKIT_BIND {
  module.def("cross_attention_forward_cuda", &forward_cuda, Unlocked());
  module.def("cross_attention_backward_cuda", &backward_cuda, Unlocked());
}

}  // namespace
}  // namespace ldmkit::device

#endif
