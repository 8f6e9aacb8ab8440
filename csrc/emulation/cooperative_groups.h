// The basics of CUDA's header of the same name: the block, tiles of 2^n lanes, coalesced nothing.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

class thread_block {
 public:
  static void sync(LDMKIT_PLACE) { __syncthreads(place); }
  static unsigned thread_rank() { return static_cast<unsigned>(ldmkit::emulation::thread_rank()); }
  static unsigned num_threads() { return blockDim.x * blockDim.y * blockDim.z; }
  static unsigned size() { return num_threads(); }
  static dim3 group_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
  static dim3 thread_index() { return {threadIdx.x, threadIdx.y, threadIdx.z}; }
};

inline thread_block this_thread_block() { return {}; }

template <unsigned Size, class Parent = void>
class thread_block_tile {
  static_assert(Size > 0 && Size <= 32 && (Size & (Size - 1)) == 0, "a tile has 1, 2, 4, 8, 16 or 32 threads");

 public:
  static void sync(LDMKIT_PLACE) { __syncwarp(mask(), place); }
  static unsigned thread_rank() { return thread_block::thread_rank() % Size; }
  static constexpr unsigned num_threads() { return Size; }
  static constexpr unsigned size() { return Size; }
  static unsigned meta_group_rank() { return thread_block::thread_rank() / Size; }
  static unsigned meta_group_size() { return (thread_block::num_threads() + Size - 1) / Size; }
  template <class T>
  static T shfl(T value, int source, LDMKIT_PLACE) { return __shfl_sync(mask(), value, source, Size, place); }
  template <class T>
  static T shfl_xor(T value, int bits, LDMKIT_PLACE) { return __shfl_xor_sync(mask(), value, bits, Size, place); }
  template <class T>
  static T shfl_down(T value, unsigned delta, LDMKIT_PLACE) { return __shfl_down_sync(mask(), value, delta, Size, place); }
  template <class T>
  static T shfl_up(T value, unsigned delta, LDMKIT_PLACE) { return __shfl_up_sync(mask(), value, delta, Size, place); }
  static bool any(int predicate, LDMKIT_PLACE) { return __any_sync(mask(), predicate, place) != 0; }
  static bool all(int predicate, LDMKIT_PLACE) { return __all_sync(mask(), predicate, place) != 0; }
  static unsigned ballot(int predicate, LDMKIT_PLACE) { return __ballot_sync(mask(), predicate, place) >> first(); }

  static unsigned mask() { return (~0u >> (32 - Size)) << first(); }

 private:
  static unsigned first() { return thread_block::thread_rank() % 32 / Size * Size; }
};

template <unsigned Size, class Parent>
thread_block_tile<Size, Parent> tiled_partition(const Parent&) {
  return {};
}

}  // namespace cooperative_groups
