// GroupNorm and SiLU for CUDA: how the shape of an image decides the cut and the regime, and the launches. A group that fits on
// chip is read once, by one block or a cluster of blocks that hold it in shared memory. A larger one, or where there are no
// clusters, goes in several launches: each tile's moments (the backward's sums), their combination, and the rest over a second
// read.
#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "group_norm_silu.h"
#include "group_norm_silu_backward.cuh"
#include "group_norm_silu_forward.cuh"

namespace ldmkit {
namespace group_norm {
namespace {

#ifdef LDMKIT_EMULATION  // so small that small shapes come through every regime
constexpr int64_t kSlice = 128, kTile = 512, kLongTile = 1024;
#else
constexpr int64_t kSlice = 4 * 1024;  // bytes: what a slice has at least, where there are groups enough
constexpr int64_t kTile = 24 * 1024;  // of one tensor in a block, where a block or a cluster holds a group; more, if need be
constexpr int64_t kLongTile = 48 * 1024;  // of all tensors in a block, where a cluster cannot hold a group
#endif
constexpr int64_t kCluster = 8;           // blocks; what every device with clusters allows
constexpr int64_t kLines = kThreads / 2;  // of a band, so that working space stays small

struct Device {
  int64_t shared;  // bytes a block may have
  bool clusters;   // the device has them, and the code that it runs was built for them
};

int current_device(Device* device) {
#ifdef LDMKIT_EMULATION
  *device = {227 * 1024, false};
#else
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // bytes, negative with clusters; 0 where nobody asked yet
  int number = 0, found = 0;
  if (const int code = cudaGetDevice(&number)) return code;
  if (number < kDevices) found = known[number].load(std::memory_order_relaxed);
  if (found == 0) {
    cudaFuncAttributes attributes;
    if (const int code = cudaDeviceGetAttribute(&found, cudaDevAttrMaxSharedMemoryPerBlockOptin, number)) return code;
    if (const int code = cudaFuncGetAttributes(&attributes, forward<float, 4, 1, Mode::once>)) return code;
    if (attributes.ptxVersion >= 90) found = -found;
    if (number < kDevices) known[number].store(found, std::memory_order_relaxed);
  }
  *device = {std::abs(found), found < 0};
#endif
  return cudaSuccess;
}

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whole groups, so few that a slice has kSlice bytes, and rows of whole packs and 64 bytes in NHWC; no more than kLines lines.
int64_t groups_of_slice(const GroupNormSilu& call, int64_t V, int64_t size) {
  int64_t found = 0;
  for (int64_t groups = 1; groups <= call.groups; ++groups) {
    const int64_t channels = call.channels / call.groups * groups;
    if (call.groups % groups != 0 || (call.channels_last && channels % V != 0)) continue;
    if (found > 0 && (call.channels_last ? channels / V : channels) > kLines) break;
    found = groups;
    if (channels * call.spatial * size >= kSlice && (!call.channels_last || channels * size >= 64)) break;
  }
  return found;
}

// A kernel's element, those in a pack, and the channels of a line.
template <class Element, int kV, int kQ>
struct Variant {
  using T = Element;
  using C = typename Compute<T>::type;
  static constexpr int V = kV, Q = kQ;
};

// How a call is cut: `once`, in so many parts; or in parts of kLongTile. V: elements of a pack; Q: channels of a line.
Cut cut_into(const GroupNormSilu& call, int64_t slice_groups, int64_t V, int64_t Q, bool once, int64_t parts) {
  const int64_t channels = call.channels / call.groups * slice_groups, lines = channels / Q,
                band_lines = up(lines, up(lines, kLines));
  const int64_t steps = call.spatial / (V / Q), part_steps = up(steps, parts), bands = up(lines, band_lines);
  int64_t lanes = std::min(kThreads / band_lines, part_steps);
  if (!call.channels_last && lanes < part_steps)
    lanes -= lanes % (lanes >= 8 ? 4 : lanes >= 2 ? 2 : 1);  // whole sectors of 32 bytes
  Cut cut{};
  cut.groups = static_cast<int>(call.groups);
  cut.group_channels = static_cast<int>(call.channels / call.groups);
  cut.slices = static_cast<int>(call.groups / slice_groups);
  cut.slice_groups = static_cast<int>(slice_groups);
  cut.lines = static_cast<int>(lines);
  cut.bands = static_cast<int>(bands);
  cut.band_lines = static_cast<int>(band_lines);
  cut.band_channels = static_cast<int>(band_lines * Q);
  cut.lanes = static_cast<int>(lanes);
  cut.tiles = static_cast<int>(bands * parts);
  cut.parts = static_cast<int>(parts);
  cut.part_steps = static_cast<int>(part_steps);
  cut.step_pixels = static_cast<int>(V / Q);
  cut.steps = steps;
  cut.slice_stride = call.channels_last ? channels : channels * call.spatial;
  cut.line_stride = call.channels_last ? V : call.spatial;
  cut.step_stride = call.channels_last ? call.channels : V;
  cut.channels_last = call.channels_last;
  cut.slices_first = call.channels_last && !once;
  cut.once = once;
  return cut;
}

// A plan: the cut, and the bytes of shared memory that a block needs for staged tensors, and with working space.
struct Plan {
  Cut cut;
  int64_t staged, shared;
};

template <class Kind>
Plan plan_of(const GroupNormSilu& call, Kind, const Device& device, bool backward) {
  using C = typename Kind::C;
  constexpr int64_t V = Kind::V, Q = Kind::Q, size = sizeof(typename Kind::T);
  const int64_t tensors = 1 + (backward ? 1 : 0) + (call.residual == nullptr ? 0 : 1);
  const auto with_shared = [&](const Cut& cut) -> Plan {
    const int64_t staged = cut.slots() * V * size * tensors, entries = Q * cut.band_lines * cut.lanes;
    const int64_t sums = backward ? even(static_cast<int>(3 * (entries + cut.band_channels))) : 2 * entries;
    return {cut, staged, staged + int64_t(sizeof(C)) * (sums + 2 * cut.slice_groups)};
  };
  const int64_t slice_groups = groups_of_slice(call, V, size), lines = call.channels / call.groups * slice_groups / Q;
  const int64_t steps = call.spatial / (V / Q), bytes = lines * steps * V * size, most = device.clusters ? kCluster : 1;
  if (lines <= kLines) {
    int64_t parts = 1;
    while (parts < most && 2 * parts <= steps && bytes > parts * kTile) parts *= 2;
    const Plan plan = with_shared(cut_into(call, slice_groups, V, Q, true, parts));
    if (plan.shared <= device.shared && (parts > 1 || bytes <= kTile)) return plan;
  }
  const int64_t band_lines = up(lines, up(lines, kLines));
  return with_shared(
      cut_into(call, slice_groups, V, Q, false, std::min(steps, up(band_lines * steps * V * size * tensors, kLongTile))));
}

// `cluster` neighbouring blocks at a time, which a device without clusters is never asked for.
template <class T>
int launch_once(void (*kernel)(Arguments<T>), dim3 grid, int cluster, int64_t shared, cudaStream_t stream,
                const Arguments<T>& a) {
#ifndef LDMKIT_EMULATION
  if (cluster > 1) return launch_cluster(grid, kThreads, cluster, static_cast<size_t>(shared), stream, kernel, a);
#endif
  return LAUNCH(kernel, grid, kThreads, static_cast<size_t>(shared), stream, a);
}

// ------------------------------------------------------------------------------------------------------------------------ one
// call

// Calls work(Variant) with the one that serves a call: 16 bytes a pack where the shape of an image allows it, else one element.
template <class T, class Work>
int with_pack(const GroupNormSilu& call, const Work& work) {
  constexpr int V = sizeof(T) == 8 ? 1 : 16 / sizeof(T);
  if (V == 1 || (call.channels_last ? call.channels : call.spatial) % V != 0) return work(Variant<T, 1, 1>());
  return call.channels_last ? work(Variant<T, V, V>()) : work(Variant<T, V, 1>());
}

template <class Work>
int with_variant(const GroupNormSilu& call, const Work& work) {
  switch (call.dtype) {
    case Dtype::f32: return with_pack<float>(call, work);
    case Dtype::f64: return with_pack<double>(call, work);
    case Dtype::f16: return with_pack<__half>(call, work);
    case Dtype::bf16: return with_pack<__nv_bfloat16>(call, work);
  }
  return cudaErrorInvalidValue;
}

// Whether packs can be read at once.
template <class Kind>
bool aligned(const void* pointer, int64_t image_bytes, Kind) {
  return (reinterpret_cast<uintptr_t>(pointer) | uintptr_t(image_bytes)) % (Kind::V * sizeof(typename Kind::T)) == 0;
}

template <class Kind>
Arguments<typename Kind::T> arguments_of(const GroupNormSilu& call, const Cut& cut, Kind kind) {
  using T = typename Kind::T;
  using C = typename Kind::C;
  Arguments<T> a{};
  a.cut = cut;
  a.x_image = call.x_image;
  a.residual_image = call.residual_image;
  a.image_size = call.channels * call.spatial;
  a.x = static_cast<const T*>(call.x);
  a.residual = static_cast<const T*>(call.residual);
  a.weight = static_cast<const T*>(call.weight);
  a.bias = static_cast<const T*>(call.bias);
  a.shift = static_cast<const T*>(call.shift);
  a.group_share = 1 / (C(cut.group_channels) * C(call.spatial));
  a.eps = static_cast<C>(call.eps);
  a.silu = call.silu;
  a.x_aligned = aligned(call.x, call.x_image * int64_t(sizeof(T)), kind);
  a.residual_aligned = aligned(call.residual, call.residual_image * int64_t(sizeof(T)), kind);
  return a;
}

}  // namespace
}  // namespace group_norm

using namespace group_norm;

int64_t group_norm_silu_workspace(const GroupNormSilu& call, bool backward) {
  Device device{};
  int64_t bytes = 0;
  current_device(&device);  // if that fails, so will the launch
  with_variant(call, [&](auto kind) {
    using C = typename decltype(kind)::C;
    const Cut cut = plan_of(call, kind, device, backward).cut;
    const int64_t groups = call.images * call.groups;
    bytes = int64_t(sizeof(Pair<C>)) * groups * cut.tiles;
    if (backward) bytes += int64_t(sizeof(Pair<C>)) * groups + int64_t(sizeof(C)) * call.images * cut.parts * 3 * call.channels;
    return 0;
  });
  return bytes;
}

int group_norm_silu_forward_cuda(const GroupNormSilu& call, void* y, void* mean, void* rstd, void* workspace,
                                 void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  Device device{};
  if (const int code = current_device(&device)) return code;
  return with_variant(call, [&](auto kind) -> int {
    using Kind = decltype(kind);
    using T = typename Kind::T;
    using C = typename Kind::C;
    const Plan plan = plan_of(call, kind, device, false);
    const Cut& cut = plan.cut;
    const int64_t blocks = call.images * cut.slices * cut.tiles, groups = call.images * call.groups;
    if (std::max(blocks, groups) > INT32_MAX) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned>(blocks));
    Arguments<T> a = arguments_of(call, cut, kind);
    a.result = static_cast<T*>(y);
    a.mean = static_cast<C*>(mean);
    a.rstd = static_cast<C*>(rstd);
    a.partial = static_cast<Pair<C>*>(workspace);
    if (cut.once) return launch_once<T>(forward<T, Kind::V, Kind::Q, Mode::once>, grid, cut.tiles, plan.shared, stream, a);
    if (const int code = LAUNCH((forward<T, Kind::V, Kind::Q, Mode::reduce>), grid, kThreads, plan.shared, stream, a))
      return code;
    if (const int code = LAUNCH((finish<C>), dim3(static_cast<unsigned>(groups)), kThreads, 0, stream, cut, a.partial,
                                a.group_share, a.eps, a.mean, a.rstd))
      return code;
    return LAUNCH((forward<T, Kind::V, Kind::Q, Mode::apply>), grid, kThreads, plan.staged, stream, a);
  });
}

int group_norm_silu_backward_cuda(const GroupNormSilu& call, const void* grad, int64_t grad_image, const void* mean,
                                  const void* rstd, void* grad_x, void* grad_weight, void* grad_bias, void* grad_shift,
                                  void* workspace, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  Device device{};
  if (const int code = current_device(&device)) return code;
  return with_variant(call, [&](auto kind) -> int {
    using Kind = decltype(kind);
    using T = typename Kind::T;
    using C = typename Kind::C;
    const Plan plan = plan_of(call, kind, device, true);
    const Cut& cut = plan.cut;
    const int64_t blocks = call.images * cut.slices * cut.tiles, groups = call.images * call.groups;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned>(blocks)), channels(static_cast<unsigned>(call.channels));
    Arguments<T> a = arguments_of(call, cut, kind);
    a.grad = static_cast<const T*>(grad);
    a.grad_image = grad_image;
    a.grad_aligned = aligned(grad, grad_image * int64_t(sizeof(T)), kind);
    a.result = static_cast<T*>(grad_x);
    a.mean = static_cast<C*>(const_cast<void*>(mean));
    a.rstd = static_cast<C*>(const_cast<void*>(rstd));
    a.partial = static_cast<Pair<C>*>(workspace);
    a.total = a.partial + groups * cut.tiles;
    a.channel_sums = reinterpret_cast<C*>(a.total + groups);
    if (const int code =
            cut.once ? launch_once<T>(backward<T, Kind::V, Kind::Q, Mode::once>, grid, cut.tiles, plan.shared, stream, a)
                     : LAUNCH((backward<T, Kind::V, Kind::Q, Mode::reduce>), grid, kThreads, plan.shared, stream, a))
      return code;
    int span = 1;
    while (span < kThreads && span < cut.tiles) span *= 2;
    if (const int code = LAUNCH((parameters<T>), channels, kThreads, 0, stream, a, call.images, span,
                                static_cast<T*>(grad_weight), static_cast<T*>(grad_bias), static_cast<T*>(grad_shift)))
      return code;
    return cut.once ? cudaSuccess
                    : LAUNCH((backward<T, Kind::V, Kind::Q, Mode::apply>), grid, kThreads, plan.staged, stream, a);
  });
}

}  // namespace ldmkit
