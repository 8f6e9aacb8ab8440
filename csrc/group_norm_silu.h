// GroupNorm (Wu and He 2018, arXiv:1803.08494, eq. 1 and 2) of h = x + shift + residual, then SiLU. Free of torch: raw
// pointers, sizes and strides in elements.
#pragma once

#include <cstdint>
#include <functional>

#include "dtype.h"

namespace ldmkit {

// One call. An image's insides are dense: (channels, spatial), or (spatial, channels) where channels_last; images of x,
// residual and grad are `*_image` elements apart, those of y and grad_x follow one another. weight and bias are (channels,),
// shift is (images, channels), all dense; weight, bias, shift and residual may be null. Nothing here is empty.
struct GroupNormSilu {
  Dtype dtype;
  int64_t images, channels, groups, spatial;
  bool channels_last, silu;
  double eps;
  const void *x, *residual, *weight, *bias, *shift;
  int64_t x_image, residual_image;
};

// What the CPU's kernels run on: `run` calls work(begin, end) for parts of [0, count), none on its own thread unless it has
// `grain` items at least, and waits for all. No result depends on the number of threads.
struct Threads {
  int64_t count;
  void (*run)(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work);
};

// mean and rstd are (images, groups) in float, double for doubles; grad_weight and grad_bias (channels,), grad_shift
// (images, channels).
void group_norm_silu_forward_cpu(const GroupNormSilu& call, void* y, void* mean, void* rstd, const Threads& threads);
void group_norm_silu_backward_cpu(const GroupNormSilu& call, const void* grad, int64_t grad_image, const void* mean,
                                  const void* rstd, void* grad_x, void* grad_weight, void* grad_bias, void* grad_shift,
                                  const Threads& threads);

// CUDA launchers return a cudaError_t, 0 for success, and do not wait. `stream` is a cudaStream_t; `workspace` is 16-byte
// aligned and as large as group_norm_silu_workspace says.
int64_t group_norm_silu_workspace(const GroupNormSilu& call, bool backward);
int group_norm_silu_forward_cuda(const GroupNormSilu& call, void* y, void* mean, void* rstd, void* workspace, void* stream);
int group_norm_silu_backward_cuda(const GroupNormSilu& call, const void* grad, int64_t grad_image, const void* mean,
                                  const void* rstd, void* grad_x, void* grad_weight, void* grad_bias, void* grad_shift,
                                  void* workspace, void* stream);

}  // namespace ldmkit
