// GEGLU: (rows, 2n) => (rows, n), first half times GELU of the second half. Free of torch: raw pointers, strides in elements.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace ldmkit {

// One slice of a matrix, `columns` of them from `column` on in rows [row_begin, row_end). All strides are between rows.
// `stream` writes past the caches; outputs and their rows must then begin on multiples of 64 bytes, and so must `column`.
struct GegluSlice {
  int64_t n, row_begin, row_end, column, columns;
  bool stream;
};

void geglu_forward_cpu(Dtype dtype, const void* x, int64_t x_stride, void* y, const GegluSlice& slice);

// grad_x is a dense (rows, 2n); y of the forward is a dense (rows, n).
void geglu_backward_cpu(Dtype dtype, const void* grad, int64_t grad_stride, const void* x, int64_t x_stride, void* grad_x,
                        const GegluSlice& slice);

// CUDA launchers return a cudaError_t, 0 for success, and do not wait. `stream` is a cudaStream_t.
int geglu_forward_cuda(Dtype dtype, const void* x, int64_t x_stride, void* y, int64_t rows, int64_t n, void* stream);
int geglu_backward_cuda(Dtype dtype, const void* grad, int64_t grad_stride, const void* x, int64_t x_stride, void* grad_x,
                        int64_t rows, int64_t n, void* stream);

}  // namespace ldmkit
