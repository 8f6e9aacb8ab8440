// Attention on CUDA devices, in memory as the kernels want it; see cross_attention.h for what is computed.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace ldmkit {

// (B, H, rows, D) in device memory, neighbours in the last dimension adjacent; strides in elements. In fp16 and bf16, rows
// begin at multiples of 16 bytes and are a multiple of 8 long.
struct DeviceRows {
  const void* data;
  int64_t batch, head, row;
};

// A mask that broadcasts to (B, H, L, S), with stride 0 where it is broadcast, neighbouring keys adjacent: bytes, true where a
// query may attend to a key, or numbers in the dtype of q, added to the scores. `hidden` (its B, its H, S) tells the keys that
// no query may attend to. No data is no mask.
struct DeviceMask {
  const void* data;
  bool additive;
  int64_t batch, head, row;
  const uint8_t* hidden;
  int64_t hidden_batch, hidden_head;
};

// `width` is D; `padded` is the length of the rows of q, k, v and grad, whose columns from `width` on are zeros.
struct DeviceAttention {
  Dtype dtype;
  int64_t batches, heads, queries, keys, width, padded;
  double scale;
  DeviceRows q, k, v;
  DeviceMask mask;
};

// The gradient's further inputs. grad and out as q; lse and grad_lse (or null) dense (B, H, L) in fp32, in fp64 where q is.
struct DeviceGradient {
  DeviceRows grad, out;
  const void *lse, *grad_lse;
};

// What the gradient writes: dq dense (B, L, H, D), dk and dv dense (B, S, H, D); delta is scratch like lse, and partial scratch
// of attention_backward_scratch_cuda elements of lse's dtype.
struct DeviceGradientOutputs {
  void *dq, *dk, *dv, *delta, *partial;
};

// Launchers return a cudaError_t, 0 for success, and do not wait; `stream` is a cudaStream_t. There is at least one query and
// key. out is dense (B, L, H, D), lse dense (B, H, L).
int attention_forward_cuda(const DeviceAttention& call, void* out, void* lse, void* stream);
int64_t attention_backward_scratch_cuda(const DeviceAttention& call);
int attention_backward_cuda(const DeviceAttention& call, const DeviceGradient& gradient, const DeviceGradientOutputs& outputs,
                            void* stream);

// Head dimensions that are served.
constexpr int64_t kAttentionWidest = 512;

}  // namespace ldmkit
