// GEGLU of a linear layer: (rows, k) => hidden (rows, 2n) = x weight^T + bias => (rows, n). Free of torch: raw pointers, strides in
// elements.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace ldmkit {

// x is (rows, k), weight (2n, k), both with dense rows; for CUDA these are 16-byte aligned and k is a multiple of 16 bytes. bias is
// a dense (2n) or null.
struct GegluLinear {
  Dtype dtype;
  const void* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  const void* bias;
  int64_t rows, n, k;
};

// CUDA launchers return a cudaError_t, 0 for success, and do not wait. `stream` is a cudaStream_t.
// y is a dense (rows, n); hidden a dense (rows, 2n), or null where it need not be kept.
int geglu_linear_forward_cuda(const GegluLinear& problem, void* y, void* hidden, void* stream);

// The gradient of hidden, a dense (rows, 2n), from that of y; hidden itself is computed anew and goes nowhere.
int geglu_linear_backward_cuda(const GegluLinear& problem, const void* grad, int64_t grad_stride, void* grad_hidden, void* stream);

}  // namespace ldmkit
