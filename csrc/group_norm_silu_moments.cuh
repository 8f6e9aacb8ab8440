// Sums in a fixed order, and means and variances that survive a mean far larger than the deviation and numbers to 1e18.
#pragma once

#include "group_norm_silu_tile.cuh"

namespace ldmkit::group_norm {

template <class C>
struct alignas(2 * sizeof(C)) Pair {
  C first, second;
};

__host__ __device__ constexpr int even(int n) { return (n + 1) / 2 * 2; }  // Pairs may follow so many C's

// Past the L1: written by another block of this launch.
template <class C>
__device__ inline Pair<C> read_fresh(const Pair<C>* from) {
  return {__ldcg(&from->first), __ldcg(&from->second)};
}

struct OverWarp {
  template <class C>
  __device__ C operator()(C value) const {
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2) value += __shfl_xor_sync(~0u, value, bit);
    return value;
  }
};

// `scratch` has kWarps places in shared memory.
template <class C>
struct OverBlock {
  C* scratch;
  __device__ C operator()(C value) const {
    value = OverWarp()(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    C sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += scratch[w];
    return sum;
  }
};

// Mean and variance of 1 / `inverse` elements from those of disjoint parts (Chan, Golub and LeVeque 1983, eq. 2.1, for any
// number of them): part(i) => {mean, variance} of size(i) elements. What is summed are distances from the 0th mean, and
// averages of variances. `over` adds up what threads 0 .. ranks - 1 found.
template <class C, class Part, class Size, class Over>
__device__ inline Pair<C> combine(int parts, C inverse, int rank, int ranks, const Part& part, const Size& size,
                                  const Over& over) {
  const C pivot = part(0).first;
  C shift = 0, variance = 0;
  for (int i = rank; i < parts; i += ranks) {
    const int n = size(i);
    if (n > 0) shift += n * inverse * (part(i).first - pivot);
  }
  const C mean = pivot + over(shift);
  for (int i = rank; i < parts; i += ranks) {
    const int n = size(i);
    if (n == 0) continue;
    const Pair<C> moments = part(i);
    const C distance = moments.first - mean;
    variance += n * inverse * (moments.second + distance * distance);
  }
  return {mean, over(variance)};
}

// V values added onto the first Q, those i places apart that are equal modulo Q.
template <int Q, class C, int V>
__device__ inline void fold(C (&values)[V]) {
#pragma unroll
  for (int half = V / 2; half >= Q; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) values[i] += values[i + half];
  }
}

// Mean and variance of what a thread has seen so far of each of its Q channels (of all of them where Q = 1).
template <class C, int V, int Q>
struct Running {
  C mean[Q] = {}, variance[Q] = {};
  int count = 0;

  // Takes in packs begin .. end - 1, read(step, h[V]): their own moments in two passes, joined to those before as in `combine`.
  template <class Read>
  __device__ void add(int begin, int end, const Read& read) {
    if (begin == end) return;
    const int n = (end - begin) * (V / Q);
    count += n;
    const C inverse = C(1) / n, share = C(n) / C(count);
    C h[V], centre[Q] = {}, squares[Q] = {};
#pragma unroll 2
    for (int step = begin; step < end; ++step) {
      read(step, h);
      fold<Q>(h);
#pragma unroll
      for (int q = 0; q < Q; ++q) centre[q] += h[q];
    }
#pragma unroll
    for (int q = 0; q < Q; ++q) centre[q] *= inverse;
#pragma unroll 2
    for (int step = begin; step < end; ++step) {
      read(step, h);
#pragma unroll
      for (int i = 0; i < V; ++i) h[i] = (h[i] - centre[i % Q]) * (h[i] - centre[i % Q]);
      fold<Q>(h);
#pragma unroll
      for (int q = 0; q < Q; ++q) squares[q] += h[q];
    }
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const C distance = centre[q] - mean[q];
      mean[q] += share * distance;
      variance[q] += share * (squares[q] * inverse - variance[q] + (1 - share) * distance * distance);
    }
  }
};

}  // namespace ldmkit::group_norm
