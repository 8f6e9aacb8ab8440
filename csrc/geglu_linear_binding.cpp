#include "binding.h"

#include <algorithm>

#include "geglu.h"
#include "geglu_linear.h"

#ifdef LDMKIT_DEVICE

#include <ATen/ops/zeros.h>

namespace ldmkit::device {
namespace {

// The rows of x or weight as GegluLinear wants them: a view where they are aligned, else a copy whose rows end in zeros.
at::Tensor aligned_rows(const at::Tensor& tensor) {
  const int64_t columns = tensor.size(-1), piece = 16 / tensor.element_size();
  const at::Tensor rows = as_rows(tensor);
  const bool aligned = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 && rows.stride(0) % piece == 0;
  if (aligned && columns > 0 && columns % piece == 0) return rows;
  const int64_t count = c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1));
  const int64_t width = std::max(piece, (columns + piece - 1) / piece * piece);
  const at::Tensor padded = at::zeros({count, width}, tensor.options());
  if (columns > 0) padded.narrow(1, 0, columns).copy_(rows);
  return padded;
}

// Checked arguments, in the form that the kernels take.
class Product {
 public:
  Product(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias)
      : n(weight.size(0) / 2), lead_(x.sizes().slice(0, x.dim() - 1).vec()), rows_(c10::multiply_integers(lead_)) {
    const auto fits = [&](const at::Tensor& t) { return t.device() == x.device() && t.scalar_type() == x.scalar_type(); };
    TORCH_CHECK(weight.dim() == 2 && weight.size(0) == 2 * n && weight.size(1) == x.size(-1) && fits(weight) &&
                    (!bias || (bias->sizes() == weight.sizes().slice(0, 1) && fits(*bias))),
                "geglu_linear: weight and bias do not fit x");
    if (rows_ * n == 0) return;
    x_RK_ = aligned_rows(x);
    weight_MK_ = aligned_rows(weight);
    if (bias) bias_M_ = bias->contiguous();
  }

  at::Tensor empty(int64_t columns, const at::Tensor& like) const {
    std::vector<int64_t> shape = lead_;
    shape.push_back(columns);
    return at::empty(shape, like.options());
  }

  GegluLinear problem() const {
    return {dtype_of(x_RK_),        x_RK_.const_data_ptr(), x_RK_.stride(0), weight_MK_.const_data_ptr(), weight_MK_.stride(0),
            data_or_null(bias_M_), rows_,                  n,               x_RK_.size(1)};
  }

  const int64_t n;

 private:
  const std::vector<int64_t> lead_;
  const int64_t rows_;
  at::Tensor x_RK_, weight_MK_;
  std::optional<at::Tensor> bias_M_;
};

std::tuple<at::Tensor, at::Tensor> forward_cuda(const at::Tensor& x, const at::Tensor& weight,
                                                const std::optional<at::Tensor>& bias, bool keep) {
  const Launch launch(x);
  const Product product(x, weight, bias);
  const at::Tensor y = product.empty(product.n, x), hidden = product.empty(keep ? 2 * product.n : 0, x);
  if (y.numel() != 0) {
    void* kept = keep ? hidden.data_ptr() : nullptr;
    check_launch(geglu_linear_forward_cuda(product.problem(), y.data_ptr(), kept, launch.stream));
  }
  return {y, hidden};
}

at::Tensor backward_cuda(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias, const at::Tensor& hidden) {
  const Launch launch(x);
  const Product product(x, weight, bias);
  const at::Tensor grad_hidden = product.empty(2 * product.n, x);
  const auto fits = [&](const at::Tensor& t, int64_t numel) {
    return t.numel() == numel && t.device() == x.device() && t.scalar_type() == x.scalar_type();
  };
  TORCH_CHECK(grad.size(-1) == product.n && fits(grad, grad_hidden.numel() / 2) &&
                  fits(hidden, hidden.size(-1) == 0 ? 0 : grad_hidden.numel()),
              "geglu_linear: the incoming gradient or hidden does not fit x");
  if (grad.numel() == 0) return grad_hidden;
  const at::Tensor grad_RN = as_rows(grad);
  const GegluLinear problem = product.problem();
  if (hidden.numel() == 0) {
    check_launch(geglu_linear_backward_cuda(problem, grad_RN.const_data_ptr(), grad_RN.stride(0), grad_hidden.data_ptr(),
                                            launch.stream));
  } else {
    const at::Tensor hidden_RM = as_rows(hidden);
    check_launch(geglu_backward_cuda(problem.dtype, grad_RN.const_data_ptr(), grad_RN.stride(0), hidden_RM.const_data_ptr(),
                                     hidden_RM.stride(0), grad_hidden.data_ptr(), problem.rows, problem.n, launch.stream));
  }
  return grad_hidden;
}

LDMKIT_BIND {
  module.def("geglu_linear_forward_cuda", &forward_cuda, Unlocked());
  module.def("geglu_linear_backward_cuda", &backward_cuda, Unlocked());
}

}  // namespace
}  // namespace ldmkit::device

#endif
