// Joins the kernels to torch: tensors in, tensors out. Arguments were checked in Python; what is checked here guards memory.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#ifdef WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>

#include "geglu.h"

namespace ldmkit {
namespace {

Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kHalf: return Dtype::f16;
    case at::kBFloat16: return Dtype::bf16;
    default: TORCH_CHECK(false, "geglu: dtype ", tensor.scalar_type(), " is not served");
  }
}

// (..., columns) => (rows, columns) with neighbouring columns adjacent in memory; a view where strides allow it, else a copy.
at::Tensor as_rows(const at::Tensor& tensor) {
  const int64_t columns = tensor.size(-1);
  const at::Tensor rows = columns == 0 ? tensor.new_empty({0, 0}) : tensor.reshape({-1, columns});
  return columns <= 1 || rows.stride(1) == 1 ? rows : rows.contiguous();
}

// Runs `work` over all (row, column) tiles on torch's threads. A tile's arithmetic does not depend on how they are dealt out.
template <class Work>
void for_each_tile(int64_t rows, int64_t n, const Work& work) {
  constexpr int64_t kTile = 8192;
  const int64_t tiles = (n + kTile - 1) / kTile;
  const int64_t grain = std::max<int64_t>(1, kTile / std::max<int64_t>(1, std::min(n, kTile)));
  at::parallel_for(0, rows * tiles, grain, [&](int64_t begin, int64_t end) {
    if (tiles == 1) return work(GegluSlice{n, begin, end, 0, n});
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / tiles, column = i % tiles * kTile;
      work(GegluSlice{n, row, row + 1, column, std::min(kTile, n - column)});
    }
  });
}

#ifdef WITH_CUDA
void check_cuda(int code) { C10_CUDA_CHECK(static_cast<cudaError_t>(code)); }
#endif

at::Tensor geglu_forward(const at::Tensor& x) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) % 2 == 0, "geglu: the last dimension must be even");
  const int64_t n = x.size(-1) / 2;
  auto shape = x.sizes().vec();
  shape.back() = n;
  const at::Tensor y = at::empty(shape, x.options());
  if (y.numel() == 0) return y;
  const at::Tensor x_RN = as_rows(x);
  const int64_t rows = x_RN.size(0), x_stride = x_RN.stride(0);
  const Dtype dtype = dtype_of(x);
#ifdef WITH_CUDA
  if (x.is_cuda()) {
    const c10::cuda::CUDAGuard guard(x.device());
    check_cuda(geglu_forward_cuda(dtype, x_RN.const_data_ptr(), x_stride, y.data_ptr(), rows, n,
                                  c10::cuda::getCurrentCUDAStream().stream()));
    return y;
  }
#endif
  TORCH_CHECK(x.is_cpu(), "geglu: this build serves no ", x.device().type(), " tensors");
  const void* x_data = x_RN.const_data_ptr();
  void* y_data = y.data_ptr();
  for_each_tile(rows, n, [&](const GegluSlice& slice) { geglu_forward_cpu(dtype, x_data, x_stride, y_data, slice); });
  return y;
}

at::Tensor geglu_backward(const at::Tensor& grad, const at::Tensor& x) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == 2 * grad.size(-1) && x.numel() == 2 * grad.numel() && grad.device() == x.device() &&
                  grad.scalar_type() == x.scalar_type(),
              "geglu: the incoming gradient does not fit x");
  const int64_t n = grad.size(-1);
  const at::Tensor grad_x = at::empty(x.sizes(), x.options());
  if (grad.numel() == 0) return grad_x;
  const at::Tensor x_RN = as_rows(x), grad_RN = as_rows(grad);
  const int64_t rows = x_RN.size(0), x_stride = x_RN.stride(0), grad_stride = grad_RN.stride(0);
  const Dtype dtype = dtype_of(x);
#ifdef WITH_CUDA
  if (x.is_cuda()) {
    const c10::cuda::CUDAGuard guard(x.device());
    check_cuda(geglu_backward_cuda(dtype, grad_RN.const_data_ptr(), grad_stride, x_RN.const_data_ptr(), x_stride,
                                   grad_x.data_ptr(), rows, n, c10::cuda::getCurrentCUDAStream().stream()));
    return grad_x;
  }
#endif
  TORCH_CHECK(x.is_cpu(), "geglu: this build serves no ", x.device().type(), " tensors");
  const void *grad_data = grad_RN.const_data_ptr(), *x_data = x_RN.const_data_ptr();
  void* grad_x_data = grad_x.data_ptr();
  for_each_tile(rows, n, [&](const GegluSlice& slice) {
    geglu_backward_cpu(dtype, grad_data, grad_stride, x_data, x_stride, grad_x_data, slice);
  });
  return grad_x;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cpu"] = cpu_capability();
#ifdef WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace ldmkit

PYBIND11_MODULE(_C, module) {
  module.doc() = "ldmkit's compiled kernels; use them through ldmkit.kernels.";
  module.def("geglu_forward", &ldmkit::geglu_forward, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("geglu_backward", &ldmkit::geglu_backward, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("build_info", &ldmkit::build_info);
}
