#include "binding.h"

#include "geglu.h"
#include "geglu_slices.h"

namespace ldmkit {
namespace {

at::Tensor empty_output(const at::Tensor& x) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) % 2 == 0, "geglu: the last dimension must be even");
  auto shape = x.sizes().vec();
  shape.back() /= 2;
  return at::empty(shape, x.options());
}

void check_gradient(const at::Tensor& grad, const at::Tensor& x) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == 2 * grad.size(-1) && x.numel() == 2 * grad.numel() && grad.device() == x.device() &&
                  grad.scalar_type() == x.scalar_type(),
              "geglu: the incoming gradient does not fit x");
}

#ifndef LDMKIT_EMULATION

at::Tensor forward_cpu(const at::Tensor& x) {
  const at::Tensor y = empty_output(x);
  if (y.numel() == 0) return y;
  const at::Tensor x_RN = as_rows(x);
  const void* x_data = x_RN.const_data_ptr();
  void* y_data = y.mutable_data_ptr();
  for_each_slice(x_RN.size(0), y.size(-1), place_large_output(y, y.size(-1)), [&, dtype = dtype_of(x), stride = x_RN.stride(0)](const GegluSlice& slice) {
    geglu_forward_cpu(dtype, x_data, stride, y_data, slice);
  });
  return y;
}

at::Tensor backward_cpu(const at::Tensor& grad, const at::Tensor& x) {
  check_gradient(grad, x);
  const at::Tensor grad_x = at::empty(x.sizes(), x.options());
  if (grad.numel() == 0) return grad_x;
  const at::Tensor x_RN = as_rows(x), grad_RN = as_rows(grad);
  const void *grad_data = grad_RN.const_data_ptr(), *x_data = x_RN.const_data_ptr();
  void* grad_x_data = grad_x.mutable_data_ptr();
  const bool stream = place_large_output(grad_x, grad.size(-1));
  for_each_slice(x_RN.size(0), grad.size(-1), stream, [&, dtype = dtype_of(x)](const GegluSlice& slice) {
    geglu_backward_cpu(dtype, grad_data, grad_RN.stride(0), x_data, x_RN.stride(0), grad_x_data, slice);
  });
  return grad_x;
}

LDMKIT_BIND {
  module.def("geglu_forward_cpu", &forward_cpu, Unlocked());
  module.def("geglu_backward_cpu", &backward_cpu, Unlocked());
}

#endif

}  // namespace
}  // namespace ldmkit

#ifdef LDMKIT_DEVICE

namespace ldmkit::device {
namespace {

at::Tensor forward_cuda(const at::Tensor& x) {
  const at::Tensor y = empty_output(x);
  if (y.numel() == 0) return y;
  const at::Tensor x_RN = as_rows(x);
  const Launch launch(x);
  check_launch(geglu_forward_cuda(dtype_of(x), x_RN.const_data_ptr(), x_RN.stride(0), y.data_ptr(), x_RN.size(0), y.size(-1),
                                  launch.stream));
  return y;
}

at::Tensor backward_cuda(const at::Tensor& grad, const at::Tensor& x) {
  check_gradient(grad, x);
  const at::Tensor grad_x = at::empty(x.sizes(), x.options());
  if (grad.numel() == 0) return grad_x;
  const at::Tensor x_RN = as_rows(x), grad_RN = as_rows(grad);
  const Launch launch(x);
  check_launch(geglu_backward_cuda(dtype_of(x), grad_RN.const_data_ptr(), grad_RN.stride(0), x_RN.const_data_ptr(),
                                   x_RN.stride(0), grad_x.data_ptr(), x_RN.size(0), grad.size(-1), launch.stream));
  return grad_x;
}

LDMKIT_BIND {
  module.def("geglu_forward_cuda", &forward_cuda, Unlocked());
  module.def("geglu_backward_cuda", &backward_cuda, Unlocked());
}

}  // namespace
}  // namespace ldmkit::device

#endif
