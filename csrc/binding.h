// What the bindings share: dtypes, the guard round a device call, its error, and the list of what the module offers. A binding takes
// tensors and gives tensors; arguments were checked in Python, what is checked here guards memory.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>
#include <vector>

#ifdef WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

// Device kernels are there in CUDA builds, and in the emulated build, where the device's tensors are ordinary CPU tensors.
#if defined(WITH_CUDA) || defined(LDMKIT_EMULATION)
#define LDMKIT_DEVICE
#endif

#include "dtype.h"

#ifdef LDMKIT_EMULATION
extern "C" const char* ldmkit_emulation_error(int code);  // csrc/emulation/runtime.h
#endif

namespace ldmkit {

inline Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kHalf: return Dtype::f16;
    case at::kBFloat16: return Dtype::bf16;
    default: TORCH_CHECK(false, "dtype ", tensor.scalar_type(), " is not served");
  }
}

// The pointer behind an optional tensor, or null.
inline const void* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// (..., columns) => (rows, columns) with neighbouring columns adjacent in memory; a view where strides allow it, else a copy.
inline at::Tensor as_rows(const at::Tensor& tensor) {
  const int64_t columns = tensor.size(-1);
  const at::Tensor rows = columns == 0 ? tensor.new_empty({0, 0}) : tensor.reshape({-1, columns});
  return columns <= 1 || rows.stride(1) == 1 ? rows : rows.contiguous();
}

// Lives while kernels are launched for `tensor`: its device is current, and `stream` (a cudaStream_t) is torch's current one.
struct Launch {
#if defined(WITH_CUDA)
  explicit Launch(const at::Tensor& tensor)
      : guard(tensor.device()), stream(c10::cuda::getCurrentCUDAStream(tensor.get_device()).stream()) {}
  c10::cuda::CUDAGuard guard;
  void* stream;
#else
  explicit Launch(const at::Tensor&) {}
  void* stream = nullptr;
#endif
};

#ifdef LDMKIT_DEVICE
// What a launcher returned: a cudaError_t, 0 for success.
inline void check_launch(int code) {
#ifdef WITH_CUDA
  C10_CUDA_CHECK(static_cast<cudaError_t>(code));
#else
  TORCH_CHECK(code == 0, ldmkit_emulation_error(code));
#endif
}
#endif

// Each op's file says `LDMKIT_BIND { module.def(...); }` once; binding.cpp calls them all.
using Bind = void (*)(pybind11::module_&);
struct Binding {
  explicit Binding(Bind bind) { all().push_back(bind); }
  static std::vector<Bind>& all() {
    static std::vector<Bind> binds;
    return binds;
  }
};
#define LDMKIT_BIND                                                       \
  static void bind_this_file(pybind11::module_& module);                  \
  static const ::ldmkit::Binding binding_of_this_file(bind_this_file);    \
  static void bind_this_file(pybind11::module_& module)

// Kernels run without Python's lock.
using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;

}  // namespace ldmkit
