// The forward kernels: h = x + shift + residual, moments of its groups, y = silu((h - mean) rstd weight + bias).
#pragma once

#include "group_norm_silu_moments.cuh"

namespace ldmkit::group_norm {

enum class Mode { once, reduce, apply };

template <class T>
struct Arguments {
  using C = typename Compute<T>::type;
  Cut cut;
  int64_t x_image, residual_image, grad_image, image_size;
  const T *x, *residual, *grad, *weight, *bias, *shift;
  T* result;           // y, or grad_x
  C *mean, *rstd;      // (image, group): found by the forward, used by the backward
  Pair<C>* partial;    // (image, group, tile): moments, or the backward's two sums
  Pair<C>* total;      // (image, group): the backward's two sums, each over the number of elements
  C* channel_sums;     // (image, part, 3, channel)
  C group_share, eps;  // group_share: 1 / elements of a group
  bool silu, x_aligned, residual_aligned, grad_aligned;
};

__device__ inline float sigmoid(float z) { return __fdividef(1.0f, 1.0f + fast_exp2(-1.44269504088896340736f * z)); }
__device__ inline double sigmoid(double z) { return 1.0 / (1.0 + exp(-z)); }
__device__ inline float inverse_root(float x) { return 1.0f / sqrtf(x); }
__device__ inline double inverse_root(double x) { return 1.0 / sqrt(x); }

template <class T>
__device__ inline typename Compute<T>::type value_or(const T* from, int64_t at, typename Compute<T>::type otherwise) {
  return from == nullptr ? otherwise : widen(from[at]);
}

// h of a thread's packs. x and residual are staged in the first places of `slots`.
template <class T, int V, int Q>
struct Hidden {
  using C = typename Compute<T>::type;
  Stream<T, V> x, residual;
  bool shifted;
  C shift[Q];

  __device__ Hidden(const Arguments<T>& a, const Place<Q>& place, Pack<T, V>* slots)
      : x{a.x + place.image * a.x_image + place.offset, place.stride, slots + threadIdx.x, a.cut.pitch(), a.x_aligned},
        residual{a.residual == nullptr ? nullptr : a.residual + place.image * a.residual_image + place.offset, place.stride,
                 slots + a.cut.slots() + threadIdx.x, a.cut.pitch(), a.residual_aligned},
        shifted(a.shift != nullptr) {
    const int64_t channel = place.image * a.cut.channels() + place.first_channel(a.cut) + place.line * Q;
#pragma unroll
    for (int q = 0; q < Q; ++q) shift[q] = shifted && place.active ? widen(a.shift[channel + q]) : C(0);
  }

  __device__ void copy(int begin, int end) const {
    x.copy(begin, end);
    if (residual.from != nullptr) residual.copy(begin, end);
  }

  __device__ void read(int step, C (&h)[V]) const {
    const Pack<T, V> pack = x[step];
#pragma unroll
    for (int i = 0; i < V; ++i) h[i] = widen(pack.at[i]);
    if (shifted) {
#pragma unroll
      for (int i = 0; i < V; ++i) h[i] += shift[i % Q];
    }
    if (residual.from != nullptr) {
      const Pack<T, V> skipped = residual[step];
#pragma unroll
      for (int i = 0; i < V; ++i) h[i] += widen(skipped.at[i]);
    }
  }
};

// A group's mean and 1 / sqrt(variance + eps), from all its tiles.
template <class C, class Over>
__device__ Pair<C> statistics(const Cut& cut, const Pair<C>* partial, int64_t group, C share, C eps, int rank, int ranks,
                              const Over& over) {
  const int slice_group = static_cast<int>(group % cut.slice_groups);
  const Pair<C>* own = partial + group * cut.tiles;
  const Pair<C> moments = combine(
      cut.tiles, share, rank, ranks, [&](int i) { return read_fresh(own + i); },
      [&](int i) { return elements(cut, slice_group, i); }, over);
  return {moments.first, inverse_root(moments.second + eps)};
}

// The moments of each group in the tile, from all threads' `running` ones: found(group of the slice, moments), by one thread.
// `entries` has Q * pitch places: by group, lane and channel.
template <class C, int V, int Q, class Found>
__device__ void tile_moments(const Cut& cut, const Place<Q>& place, const Running<C, V, Q>& running, Pair<C>* entries,
                             const Found& found) {
  if (place.active) {
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const Channels channels = place.of_group(cut, place.slice_group(cut, q));
      const int channel = place.line * Q + q - channels.begin;
      entries[channels.begin * cut.lanes + place.lane * channels.size + channel] = {running.mean[q], running.variance[q]};
    }
  }
  __syncthreads();
  for (int group = static_cast<int>(threadIdx.x) / 32; group < cut.slice_groups; group += kWarps) {
    const Channels channels = place.of_group(cut, group);
    Pair<C> moments{0, 0};
    if (channels.size > 0) {
      const Pair<C>* own = entries + channels.begin * cut.lanes;
      const int rounds = place.steps / cut.lanes,
                longer = place.steps % cut.lanes * channels.size;  // some lanes have a step more
      moments = combine(
          channels.size * cut.lanes, C(1) / elements(cut, group, place.tile), threadIdx.x % 32, 32,
          [&](int i) { return own[i]; }, [&](int i) { return (rounds + (i < longer)) * (V / Q); }, OverWarp());
    }
    if (threadIdx.x % 32 == 0) found(group, moments);
  }
}

// `once`: all of it; where a group has several tiles, their blocks are a cluster. `reduce`: the tile's moments only. `apply`:
// with the statistics given.
template <class T, int V, int Q, Mode mode>
__global__ void __launch_bounds__(kThreads, 2) forward(const Arguments<T> a) {
  using C = typename Compute<T>::type;
  DYNAMIC_SHARED(memory);
  const Cut& cut = a.cut;
  const Place<Q> place(cut,
                       mode == Mode::apply ? gridDim.x - 1 - blockIdx.x : blockIdx.x);  // what came last may still be cached
  Pack<T, V>* slots = reinterpret_cast<Pack<T, V>*>(memory);
  const Hidden<T, V, Q> hidden(a, place, slots);
  Pair<C>* entries = reinterpret_cast<Pair<C>*>(slots + cut.slots() * (a.residual == nullptr ? 1 : 2));
  Pair<C>* found = entries + Q * cut.pitch();  // by group of the slice: mean and rstd
  const auto copy = [&](int begin, int end) { hidden.copy(begin, end); };

  if constexpr (mode != Mode::apply) {
    Running<C, V, Q> running;
    in_chunks(place.count, copy,
              [&](int begin, int end) { running.add(begin, end, [&](int step, C(&h)[V]) { hidden.read(step, h); }); });
    const bool alone = mode == Mode::once && cut.tiles == 1;
    tile_moments(cut, place, running, entries, [&](int group, Pair<C> moments) {
      if (alone) {
        found[group] = {moments.first, inverse_root(moments.second + a.eps)};
      } else {
        a.partial[place.group(cut, group) * cut.tiles + place.tile] = moments;
      }
    });
    if constexpr (mode == Mode::reduce) return;
    if (!alone) {
      cluster_sync();
      for (int group = static_cast<int>(threadIdx.x) / 32; group < cut.slice_groups; group += kWarps) {
        const Pair<C> both =
            statistics(cut, a.partial, place.group(cut, group), a.group_share, a.eps, threadIdx.x % 32, 32, OverWarp());
        if (threadIdx.x % 32 == 0) found[group] = both;
      }
    }
    __syncthreads();
    for (int group = threadIdx.x; place.tile == 0 && group < cut.slice_groups; group += kThreads) {
      a.mean[place.group(cut, group)] = found[group].first;
      a.rstd[place.group(cut, group)] = found[group].second;
    }
  }

  C mean[Q] = {}, scale[Q] = {}, offset[Q] = {};
  if (place.active) {
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const int channel = place.first_channel(cut) + place.line * Q + q, group = place.slice_group(cut, q);
      mean[q] = mode == Mode::once ? found[group].first : a.mean[place.group(cut, group)];
      scale[q] = (mode == Mode::once ? found[group].second : a.rstd[place.group(cut, group)]) * value_or(a.weight, channel, 1);
      offset[q] = value_or(a.bias, channel, 0);
    }
  }
  T* y = a.result + place.image * a.image_size + place.offset;
  const auto write = [&](int begin, int end) {
#pragma unroll 2
    for (int step = begin; step < end; ++step) {
      C h[V];
      Pack<T, V> out;
      hidden.read(step, h);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const C z = (h[i] - mean[i % Q]) * scale[i % Q] + offset[i % Q];
        out.at[i] = narrow<T>(a.silu ? z * sigmoid(z) : z);
      }
      *reinterpret_cast<Pack<T, V>*>(y + step * place.stride) = out;
    }
  };
  if constexpr (mode == Mode::apply) {
    in_chunks(place.count, copy, write);
  } else {
    write(0, place.count);
  }
}

// Between `reduce` and `apply`: one block for every group.
template <class C>
__global__ void __launch_bounds__(kThreads) finish(const Cut cut, const Pair<C>* partial, C share, C eps, C* mean, C* rstd) {
  SHARED(C, scratch, [kWarps]);
  const Pair<C> found = statistics(cut, partial, blockIdx.x, share, eps, threadIdx.x, kThreads, OverBlock<C>{scratch});
  if (threadIdx.x != 0) return;
  mean[blockIdx.x] = found.first;
  rstd[blockIdx.x] = found.second;
}

}  // namespace ldmkit::group_norm
