// Attention in fp32 and fp64 for CUDA, forward and backward: which kernels serve a call.
#include <algorithm>

#include "cross_attention_launch.cuh"
#include "cross_attention_plain.cuh"

namespace ldmkit::attention {
namespace {

template <class T, int R, int CHUNKS>
int launch_plain(const DeviceAttention& c, void* out, void* lse, cudaStream_t stream) {
  using Shape = Plain<T, R, CHUNKS>;
  const int64_t grid = c.batches * c.heads * ceil_div(c.queries, Shape::kRows);
  if (grid > kLongestGrid) return cudaErrorInvalidValue;
  return LAUNCH((plain_forward<T, R, CHUNKS>), dim3(static_cast<unsigned>(grid)), dim3(kPlainThreads), Shape::kShared, stream,
                call_of<T>(c), static_cast<T*>(out), static_cast<typename Shape::A*>(lse));
}

template <class T>
int forward_plain(const DeviceAttention& c, void* out, void* lse, cudaStream_t stream) {
  return with_width<64, 128, 512>(c.width, [&](auto wide) {
    constexpr int CHUNKS = decltype(wide)::value / kChunk, kMost = sizeof(T) == 8 ? 4 : 8;
    return launch_plain<T, CHUNKS == 8 ? 2 : kMost, CHUNKS>(c, out, lse, stream);
  });
}

template <class T, int R, int CHUNKS>
int backward_plain_of(const DeviceAttention& c, const DeviceGradient& g, const DeviceGradientOutputs& o, cudaStream_t stream) {
  using Shape = Plain<T, R, CHUNKS>;
  const Call<T> call = call_of<T>(c);
  const Gradient<T> gradient = gradient_of<T>(g, o, 1, 0);
  const int64_t heads = c.batches * c.heads;
  const int64_t query_grid = heads * ceil_div(c.queries, Shape::kRows), key_grid = heads * ceil_div(c.keys, Shape::kRows);
  if (std::max(query_grid, key_grid) > kLongestGrid) return cudaErrorInvalidValue;
  const int code = LAUNCH((plain_queries_backward<T, R, CHUNKS>), dim3(static_cast<unsigned>(query_grid)), dim3(kPlainThreads),
                          Shape::kShared, stream, call, gradient);
  if (code != cudaSuccess) return code;
  return LAUNCH((plain_keys_backward<T, R, CHUNKS>), dim3(static_cast<unsigned>(key_grid)), dim3(kPlainThreads), Shape::kShared,
                stream, call, gradient);
}

template <class T>
int backward_plain(const DeviceAttention& c, const DeviceGradient& g, const DeviceGradientOutputs& o, cudaStream_t stream) {
  return with_width<64, 128, 512>(c.width, [&](auto wide) {
    constexpr int CHUNKS = decltype(wide)::value / kChunk;
    return backward_plain_of<T, CHUNKS == 8 ? 8 / sizeof(T) : 4, CHUNKS>(c, g, o, stream);
  });
}

}  // namespace

int plain_forward_cuda(const DeviceAttention& c, void* out, void* lse, cudaStream_t stream) {
  return c.dtype == Dtype::f64 ? forward_plain<double>(c, out, lse, stream) : forward_plain<float>(c, out, lse, stream);
}

int plain_backward_cuda(const DeviceAttention& c, const DeviceGradient& gradient, const DeviceGradientOutputs& outputs,
                        cudaStream_t stream) {
  return c.dtype == Dtype::f64 ? backward_plain<double>(c, gradient, outputs, stream)
                               : backward_plain<float>(c, gradient, outputs, stream);
}

}  // namespace ldmkit::attention
