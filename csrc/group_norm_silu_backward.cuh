// The backward kernels. With n = (h - mean) rstd, z = n weight + bias and d = grad silu'(z), the gradient of h is
//   rstd (weight d - sum(weight d) / M - n sum(weight d n) / M),
// with sums over the M elements of a group. Sums of d n, d and n over each channel of each image give those, and the gradients
// of weight, bias and shift.
#pragma once

#include "group_norm_silu_forward.cuh"

namespace ldmkit::group_norm {

// What a thread knows of its channels.
template <class T, int Q>
struct Channel {
  using C = typename Compute<T>::type;
  C mean[Q] = {}, rstd[Q] = {}, weight[Q] = {}, bias[Q] = {};
  bool silu;

  __device__ Channel(const Arguments<T>& a, const Place<Q>& place) : silu(a.silu) {
    if (!place.active) return;
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const int64_t group = place.group(a.cut, place.slice_group(a.cut, q));
      const int channel = place.first_channel(a.cut) + place.line * Q + q;
      mean[q] = a.mean[group];
      rstd[q] = a.rstd[group];
      weight[q] = value_or(a.weight, channel, 1);
      bias[q] = value_or(a.bias, channel, 0);
    }
  }

  // {n, d} of an element.
  __device__ Pair<C> differentiate(C h, T grad, int q) const {
    const C n = (h - mean[q]) * rstd[q];
    if (!silu) return {n, widen(grad)};
    const C z = n * weight[q] + bias[q], s = sigmoid(z);
    return {n, widen(grad) * (s + z * s * (1 - s))};
  }
};

// sums[3][channel of the tile], from all threads' sum[3][their channels]. `entries` has 3 * Q * pitch places: [3][thread][Q].
template <class C, int Q>
__device__ void over_lanes(const Cut& cut, const Place<Q>& place, const C (&sum)[3][Q], C* entries, C* sums) {
  const int pitch = Q * cut.pitch(), thread = static_cast<int>(threadIdx.x);
  if (place.active) {
#pragma unroll
    for (int i = 0; i < 3 * Q; ++i) entries[i / Q * pitch + thread * Q + i % Q] = sum[i / Q][i % Q];
  }
  __syncthreads();
  if (cut.channels_last) {  // a channel's lanes are far apart, and channels are neighbours: a thread for each
    for (int i = thread; i < 3 * place.channels; i += kThreads) {
      const C* own = entries + i / place.channels * pitch + i % place.channels;
      C total = 0;
      for (int lane = 0; lane < cut.lanes; ++lane) total += own[lane * place.channels];
      sums[i] = total;
    }
  } else {  // lanes are neighbours: a warp for each channel
    for (int i = thread / 32; i < 3 * place.channels; i += kWarps) {
      const C* own = entries + i / place.channels * pitch + i % place.channels * cut.lanes;
      C total = 0;
      for (int lane = thread % 32; lane < cut.lanes; lane += 32) total += own[lane];
      total = OverWarp()(total);
      if (thread % 32 == 0) sums[i] = total;
    }
  }
  __syncthreads();
}

// Keeps the channels' sums for `parameters`; the two sums over each group in the tile: found(group of the slice, sums), by one
// thread.
template <class T, class C, int Q, class Found>
__device__ void keep_sums(const Arguments<T>& a, const Place<Q>& place, const C* sums, const Found& found) {
  const Cut& cut = a.cut;
  const int thread = static_cast<int>(threadIdx.x), first = place.first_channel(cut);
  C* kept = a.channel_sums + (place.image * cut.parts + place.part) * 3 * cut.channels() + first;
  for (int i = thread; i < 3 * place.channels; i += kThreads)
    kept[i / place.channels * cut.channels() + i % place.channels] = sums[i];
  for (int group = thread / 32; group < cut.slice_groups; group += kWarps) {
    const Channels channels = place.of_group(cut, group);
    Pair<C> two{0, 0};
    for (int i = channels.begin + thread % 32; i < channels.begin + channels.size; i += 32) {
      const C weight = value_or(a.weight, first + i, 1);
      two.first += weight * sums[place.channels + i];
      two.second += weight * sums[i];
    }
    two = {OverWarp()(two.first), OverWarp()(two.second)};
    if (thread % 32 == 0) found(group, two);
  }
}

// A group's two sums over the number of its elements, from all tiles.
template <class T>
__device__ Pair<typename Compute<T>::type> total_of(const Arguments<T>& a, int64_t group) {
  using C = typename Compute<T>::type;
  Pair<C> two{0, 0};
  for (int i = static_cast<int>(threadIdx.x) % 32; i < a.cut.tiles; i += 32) {
    const Pair<C> partial = read_fresh(a.partial + group * a.cut.tiles + i);
    two.first += partial.first;
    two.second += partial.second;
  }
  return {OverWarp()(two.first) * a.group_share, OverWarp()(two.second) * a.group_share};
}

// Blocks a multiprocessor must have room for: two, but sm_100's code for one of them would spill a register then.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <int Q, Mode mode>
constexpr int kRoomFor = Q == 8 && mode == Mode::once ? 1 : 2;
#else
template <int Q, Mode mode>
constexpr int kRoomFor = 2;
#endif

template <class T, int V, int Q, Mode mode>
__global__ void __launch_bounds__(kThreads, (kRoomFor<Q, mode>)) backward(const Arguments<T> a) {
  using C = typename Compute<T>::type;
  DYNAMIC_SHARED(memory);
  const Cut& cut = a.cut;
  const Place<Q> place(cut, mode == Mode::apply ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  Pack<T, V>* slots = reinterpret_cast<Pack<T, V>*>(memory);
  const Stream<T, V> grad{a.grad + place.image * a.grad_image + place.offset, place.stride, slots + threadIdx.x, cut.pitch(),
                          a.grad_aligned};
  const Hidden<T, V, Q> hidden(a, place, slots + cut.slots());
  const Channel<T, Q> own(a, place);
  C* entries = reinterpret_cast<C*>(slots + cut.slots() * (a.residual == nullptr ? 2 : 3));
  C* sums = entries + 3 * Q * cut.pitch();
  Pair<C>* found =
      reinterpret_cast<Pair<C>*>(entries + even(3 * (Q * cut.pitch() + cut.band_channels)));  // by group of the slice
  const auto copy = [&](int begin, int end) {
    hidden.copy(begin, end);
    grad.copy(begin, end);
  };

  if constexpr (mode != Mode::apply) {
    C sum[3][Q] = {};
    in_chunks(place.count, copy, [&](int begin, int end) {
#pragma unroll 1
      for (int step = begin; step < end; ++step) {
        C h[V];
        hidden.read(step, h);
        const Pack<T, V> g = grad[step];
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const Pair<C> nd = own.differentiate(h[i], g.at[i], i % Q);
          sum[0][i % Q] += nd.second * nd.first;
          sum[1][i % Q] += nd.second;
          sum[2][i % Q] += nd.first;
        }
      }
    });
    over_lanes(cut, place, sum, entries, sums);
    keep_sums(a, place, sums, [&](int group, Pair<C> two) {
      a.partial[place.group(cut, group) * cut.tiles + place.tile] = two;
      if (mode == Mode::once) found[group] = {two.first * a.group_share, two.second * a.group_share};
    });
    if constexpr (mode == Mode::reduce) return;
    if (cut.tiles > 1) {
      cluster_sync();
      for (int group = static_cast<int>(threadIdx.x) / 32; group < cut.slice_groups; group += kWarps) {
        const Pair<C> total = total_of(a, place.group(cut, group));
        if (threadIdx.x % 32 == 0) found[group] = total;
      }
    }
    __syncthreads();
  }

  Pair<C> total[Q] = {};
  if (place.active) {
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const int group = place.slice_group(cut, q);
      total[q] = mode == Mode::once ? found[group] : a.total[place.group(cut, group)];
    }
  }
  T* grad_x = a.result + place.image * a.image_size + place.offset;
  const auto write = [&](int begin, int end) {
#pragma unroll 1
    for (int step = begin; step < end; ++step) {
      C h[V];
      Pack<T, V> out;
      hidden.read(step, h);
      const Pack<T, V> g = grad[step];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int q = i % Q;
        const Pair<C> nd = own.differentiate(h[i], g.at[i], q);
        out.at[i] = narrow<T>(own.rstd[q] * (own.weight[q] * nd.second - (total[q].first + nd.first * total[q].second)));
      }
      *reinterpret_cast<Pack<T, V>*>(grad_x + step * place.stride) = out;
    }
  };
  if constexpr (mode == Mode::apply) {
    in_chunks(place.count, copy, write);
  } else {
    write(0, place.count);
  }
}

// After `once` or `reduce`, one block for every channel: the gradients of weight, bias and shift, and the groups' totals for
// `apply`. `span` threads, a power of two, add up one image's parts; images are dealt out over the rest.
template <class T>
__global__ void __launch_bounds__(kThreads)
    parameters(const Arguments<T> a, int64_t images, int span, T* grad_weight, T* grad_bias, T* grad_shift) {
  using C = typename Compute<T>::type;
  SHARED(C, sums, [6][kThreads]);
  const Cut& cut = a.cut;
  const int channels = cut.channels(), channel = static_cast<int>(blockIdx.x), group = channel / cut.group_channels;
  const int thread = static_cast<int>(threadIdx.x), rank = thread % span;
  const C weight = value_or(a.weight, channel, 1);
  C of_weight = 0, of_bias = 0;
  for (int64_t first = 0; first < images; first += kThreads / span) {
    const int64_t image = first + thread / span;
    C found[6] = {};
    for (int i = rank; image < images && i < cut.parts; i += span) {
      const C* part = a.channel_sums + (image * cut.parts + i) * 3 * channels + channel;
#pragma unroll
      for (int which = 0; which < 3; ++which) found[which] += part[which * channels];
      const C* normals_of_group = part + 2 * channels - channel + group * cut.group_channels;
      for (int c = 0; c < cut.group_channels; ++c) found[5] += normals_of_group[c];
    }
    for (int i = rank; image < images && i < cut.tiles; i += span) {
      const Pair<C> two = a.partial[(image * cut.groups + group) * cut.tiles + i];
      found[3] += two.first;
      found[4] += two.second;
    }
#pragma unroll
    for (int which = 0; which < 6; ++which) sums[which][thread] = found[which];
    for (int half = span / 2; half > 0; half /= 2) {
      __syncthreads();
#pragma unroll
      for (int which = 0; which < 6; ++which)
        if (rank < half) sums[which][thread] += sums[which][thread + half];
    }
    if (rank == 0 && image < images) {
      const C grads = sums[1][thread];
      const Pair<C> total{sums[3][thread] * a.group_share, sums[4][thread] * a.group_share};
      // n sums to 0 over a group but for the rounding of its mean, taken out here: grad_shift is small beside its parts.
      const C normals = sums[2][thread] - sums[5][thread] / C(cut.group_channels);
      of_weight += sums[0][thread];
      of_bias += grads;
      grad_shift[image * channels + channel] =
          narrow<T>(a.rstd[image * cut.groups + group] *
                    (weight * grads - sums[3][thread] / C(cut.group_channels) - normals * total.second));
      if (channel % cut.group_channels == 0) a.total[image * cut.groups + group] = total;
    }
    __syncthreads();
  }
  sums[0][thread] = of_weight;
  sums[1][thread] = of_bias;
  __syncthreads();
  if (thread != 0) return;
  for (int i = span; i < kThreads; i += span) {
    of_weight += sums[0][i];
    of_bias += sums[1][i];
  }
  grad_weight[channel] = narrow<T>(of_weight);
  grad_bias[channel] = narrow<T>(of_bias);
}

}  // namespace ldmkit::group_norm
