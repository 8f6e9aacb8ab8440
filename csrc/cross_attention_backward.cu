// The gradient of attention for CUDA: which kernels serve a call; chosen as those of cross_attention.cu are.
#include <algorithm>

#include "cross_attention_backward.cuh"
#include "cross_attention_launch.cuh"

namespace ldmkit {
namespace {

using namespace attention;

// Into how many parts the queries are dealt for the gradient of few keys, so that all of a GPU has work.
int64_t chunks_of(const DeviceAttention& c) {
  if (!in_half(c.dtype)) return 1;
  return std::max<int64_t>(1, std::min<int64_t>(8, c.queries / (4 * c.keys)));
}

int64_t key_elements(const DeviceAttention& c) { return c.batches * c.keys * c.heads * c.width; }

template <class T>
int add_parts(const DeviceAttention& c, const float* parts, T* total, cudaStream_t stream) {
  const int64_t count = key_elements(c), blocks = std::min<int64_t>(ceil_div(count, 256), 1 << 20);
  return LAUNCH((add_chunks<T>), dim3(static_cast<unsigned>(blocks)), dim3(256), 0, stream, parts, total, count,
                static_cast<int>(chunks_of(c)));
}

template <class T, int D, int KEYS, int WARPS, int SLICES, int QUERIES, int KEY_WARPS, int KEY_SLICES>
int backward_in_half(const DeviceAttention& c, const DeviceGradient& g, const DeviceGradientOutputs& o, cudaStream_t stream) {
  using OfQueries = QueriesBackward<T, D, KEYS, WARPS, SLICES>;
  using OfKeys = KeysBackward<T, D, QUERIES, KEY_WARPS, KEY_SLICES>;
  const Call<T> call = call_of<T>(c);
  const Gradient<T> gradient = gradient_of<T>(g, o, chunks_of(c), key_elements(c));
  const int64_t heads = c.batches * c.heads, chunks = chunks_of(c);
  const int64_t query_grid = heads * ceil_div(c.queries, OfQueries::kQueries);
  const int64_t key_grid = heads * ceil_div(c.keys, OfKeys::kKeys) * chunks;
  if (std::max(query_grid, key_grid) > kLongestGrid) return cudaErrorInvalidValue;
  int code = LAUNCH((queries_backward<T, D, KEYS, WARPS, SLICES>), dim3(static_cast<unsigned>(query_grid)),
                    dim3(OfQueries::kThreads), OfQueries::kShared, stream, call, gradient);
  if (code != cudaSuccess) return code;
  code = LAUNCH((keys_backward<T, D, QUERIES, KEY_WARPS, KEY_SLICES>), dim3(static_cast<unsigned>(key_grid)),
                dim3(OfKeys::kThreads), OfKeys::kShared, stream, call, gradient, static_cast<int>(chunks), key_elements(c));
  if (code != cudaSuccess || chunks == 1) return code;
  code = add_parts<T>(c, gradient.dk_parts, gradient.dk, stream);
  return code != cudaSuccess ? code : add_parts<T>(c, gradient.dv_parts, gradient.dv, stream);
}

// Tiles of keys for the gradient of queries, of queries for that of keys; for each, warps that share a row's columns.
template <class T>
int backward_of_half(const DeviceAttention& c, const DeviceGradient& g, const DeviceGradientOutputs& o, cudaStream_t stream) {
  if (c.width <= 80) {
    return with_width<40, 64, 72, 80>(c.width, [&](auto wide) {
      constexpr int D = decltype(wide)::value;
      constexpr int kTile = D < 64 ? 64 : 32;
      return backward_in_half<T, D, kTile, 4, 1, 32, 4, 1>(c, g, o, stream);
    });
  }
  if (c.width <= 160) {
    return with_width<128, 160>(c.width, [&](auto wide) {
      constexpr int D = decltype(wide)::value;
      constexpr int kTile = D <= 128 ? 32 : 16;
      return backward_in_half<T, D, kTile, 4, 1, 16, 8, 2>(c, g, o, stream);
    });
  }
  if (c.width <= 256) return backward_in_half<T, 256, 16, 8, 2, 16, 8, 4>(c, g, o, stream);
  return backward_in_half<T, 512, 16, 8, 4, 16, 8, 8>(c, g, o, stream);
}

}  // namespace

int64_t attention_backward_scratch_cuda(const DeviceAttention& c) {
  const int64_t chunks = chunks_of(c);
  return chunks > 1 ? 2 * chunks * key_elements(c) : 0;
}

int attention_backward_cuda(const DeviceAttention& c, const DeviceGradient& gradient, const DeviceGradientOutputs& outputs,
                            void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  if (c.dtype == Dtype::f16) return backward_of_half<__half>(c, gradient, outputs, stream);
  if (c.dtype == Dtype::bf16) return backward_of_half<__nv_bfloat16>(c, gradient, outputs, stream);
  return plain_backward_cuda(c, gradient, outputs, stream);
}

}  // namespace ldmkit
