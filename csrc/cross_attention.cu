// Attention forward for CUDA: which kernel serves a call. The choice follows from dtype, head dimension and numbers of queries and
// keys of one image; how queries are dealt to blocks changes no result.
#include <algorithm>

#include "cross_attention_forward.cuh"
#include "cross_attention_launch.cuh"

namespace ldmkit {
namespace {

using namespace attention;

constexpr int64_t kBlocksAtOnce = 600;  // about what a large GPU holds

template <class T, int D, int KEYS>
int launch_few(const DeviceAttention& c, void* out, void* lse, cudaStream_t stream) {
  const int64_t heads = c.batches * c.heads, blocks = ceil_div(c.queries, 16 * kFewWarps);
  const int64_t tiles = std::max<int64_t>(1, std::min<int64_t>(8, heads * blocks / kBlocksAtOnce));  // of each warp
  const int64_t parts = ceil_div(blocks, tiles);
  if (heads * parts > kLongestGrid) return cudaErrorInvalidValue;
  return LAUNCH((few_keys_forward<T, D, KEYS>), dim3(static_cast<unsigned>(heads * parts)), dim3(32 * kFewWarps),
                (few_keys_shared<T, D, KEYS>()), stream, call_of<T>(c), static_cast<T*>(out), static_cast<float*>(lse),
                static_cast<int>(parts));
}

template <class T, int D, int KEYS, int M, int WARPS, int SLICES>
int launch_many(const DeviceAttention& c, void* out, void* lse, cudaStream_t stream) {
  using Shape = ManyKeys<T, D, KEYS, M, WARPS, SLICES>;
  const int64_t grid = c.batches * c.heads * ceil_div(c.queries, Shape::kQueries);
  if (grid > kLongestGrid) return cudaErrorInvalidValue;
  return LAUNCH((many_keys_forward<T, D, KEYS, M, WARPS, SLICES>), dim3(static_cast<unsigned>(grid)), dim3(Shape::kThreads),
                Shape::kShared, stream, call_of<T>(c), static_cast<T*>(out), static_cast<float*>(lse));
}

template <class T>
int forward_in_half(const DeviceAttention& c, void* out, void* lse, cudaStream_t stream) {
  if (c.keys <= 80 && c.width <= 160) {
    return with_width<40, 64, 72, 80, 128, 160>(
        c.width, [&](auto wide) { return launch_few<T, decltype(wide)::value, 80>(c, out, lse, stream); });
  }
  if (c.keys <= 160 && c.width <= 80) {
    return with_width<40, 64, 80>(
        c.width, [&](auto wide) { return launch_few<T, decltype(wide)::value, 160>(c, out, lse, stream); });
  }
  if (c.width <= 80) {
    return with_width<40, 64, 72, 80>(c.width, [&](auto wide) {
      constexpr int D = decltype(wide)::value;
      constexpr int kTile = D < 64 ? 64 : D == 64 ? 48 : 32;
      return launch_many<T, D, kTile, 2, 4, 1>(c, out, lse, stream);
    });
  }
  if (c.width <= 160) {
    return with_width<128, 160>(
        c.width, [&](auto wide) { return launch_many<T, decltype(wide)::value, 32, 1, 4, 1>(c, out, lse, stream); });
  }
  if (c.width <= 256) return launch_many<T, 256, 32, 1, 8, 2>(c, out, lse, stream);
  return launch_many<T, 512, 16, 1, 8, 4>(c, out, lse, stream);
}

}  // namespace

int attention_forward_cuda(const DeviceAttention& c, void* out, void* lse, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  if (c.dtype == Dtype::f16) return forward_in_half<__half>(c, out, lse, stream);
  if (c.dtype == Dtype::bf16) return forward_in_half<__nv_bfloat16>(c, out, lse, stream);
  return plain_forward_cuda(c, out, lse, stream);
}

}  // namespace ldmkit
