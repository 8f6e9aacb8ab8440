// What the launchers of attention share: a call in the kernels' terms, and the choice among widths.
#pragma once

#include "cross_attention_call.cuh"

namespace ldmkit::attention {

constexpr int64_t kLongestGrid = 0x7fffffff;

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

template <class T>
Rows<const T> rows_of(const DeviceRows& rows) {
  return {static_cast<const T*>(rows.data), rows.batch, rows.head, rows.row};
}

template <class T>
Call<T> call_of(const DeviceAttention& c) {
  return {static_cast<int>(c.heads),
          static_cast<int>(c.queries),
          static_cast<int>(c.keys),
          static_cast<int>(c.width),
          static_cast<int>(c.padded),
          static_cast<typename Compute<T>::type>(c.scale),
          rows_of<T>(c.q),
          rows_of<T>(c.k),
          rows_of<T>(c.v),
          c.mask.data,
          c.mask.additive,
          c.mask.batch,
          c.mask.head,
          c.mask.row,
          c.mask.hidden,
          c.mask.hidden_batch,
          c.mask.hidden_head};
}

// Calls use(Wide<D>) with the narrowest D that holds `width`.
template <int D>
struct Wide {
  static constexpr int value = D;
};
template <int FIRST, int... REST, class Use>
int with_width(int64_t width, const Use& use) {
  if constexpr (sizeof...(REST) > 0) {
    if (width > FIRST) return with_width<REST...>(width, use);
  }
  return use(Wide<FIRST>());
}

inline bool in_half(Dtype dtype) { return dtype == Dtype::f16 || dtype == Dtype::bf16; }

// The gradient's inputs and outputs; parts of dk and dv, `elements` long in all, where queries go in several chunks.
template <class T>
Gradient<T> gradient_of(const DeviceGradient& g, const DeviceGradientOutputs& o, int64_t chunks, int64_t elements) {
  using A = typename Compute<T>::type;
  A* parts = chunks > 1 ? static_cast<A*>(o.partial) : nullptr;
  return {rows_of<T>(g.grad),
          rows_of<T>(g.out),
          static_cast<const A*>(g.lse),
          static_cast<const A*>(g.grad_lse),
          static_cast<A*>(o.delta),
          static_cast<T*>(o.dq),
          static_cast<T*>(o.dk),
          static_cast<T*>(o.dv),
          parts,
          parts == nullptr ? nullptr : parts + chunks * elements};
}

// Without tensor cores, in fp32 and fp64; see attention_forward_cuda and attention_backward_cuda.
int plain_forward_cuda(const DeviceAttention& call, void* out, void* lse, cudaStream_t stream);
int plain_backward_cuda(const DeviceAttention& call, const DeviceGradient& gradient, const DeviceGradientOutputs& outputs,
                        cudaStream_t stream);

}  // namespace ldmkit::attention
