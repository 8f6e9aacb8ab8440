// Barriers, shuffles, votes, reductions over a warp, and integer atomics, by CUDA's names. There are no float atomics: their
// result depends on the order of threads, and a kernel of ours that used one must not compile.
#pragma once

#include "runtime.h"

inline void __syncthreads(LDMKIT_PLACE) { ldmkit::emulation::meet_block(0, place); }
inline int __syncthreads_count(int x, LDMKIT_PLACE) { return ldmkit::emulation::meet_block(x, place).sum; }
inline int __syncthreads_and(int x, LDMKIT_PLACE) { return ldmkit::emulation::meet_block(x, place).all; }
inline int __syncthreads_or(int x, LDMKIT_PLACE) { return ldmkit::emulation::meet_block(x, place).any; }
inline void __syncwarp(unsigned mask = ~0u, LDMKIT_PLACE) { ldmkit::emulation::sync_warp(mask, place); }

namespace ldmkit::emulation {

// From lane `source`, if that is in the caller's segment of `width` lanes; else the caller's own value.
template <class T>
T shuffle_within(unsigned mask, const char* what, T value, int source, int width, const Place& place) {
  static_assert(sizeof(T) <= 16, "a shuffle moves up to 16 bytes");
  const int first = lane_id() / width * width;
  const bool inside = source >= first && source < first + width;
  shuffle(mask, what, &value, sizeof(T), inside ? source : lane_id(), place);
  return value;
}

}  // namespace ldmkit::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, LDMKIT_PLACE) {
  const int first = ldmkit::emulation::lane_id() / width * width;
  return ldmkit::emulation::shuffle_within(mask, "__shfl_sync", value, first + (source & (width - 1)), width, place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, LDMKIT_PLACE) {
  return ldmkit::emulation::shuffle_within(mask, "__shfl_xor_sync", value, ldmkit::emulation::lane_id() ^ bits, width, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, LDMKIT_PLACE) {
  const int source = ldmkit::emulation::lane_id() + static_cast<int>(delta);
  return ldmkit::emulation::shuffle_within(mask, "__shfl_down_sync", value, source, width, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, LDMKIT_PLACE) {
  const int source = ldmkit::emulation::lane_id() - static_cast<int>(delta);
  return ldmkit::emulation::shuffle_within(mask, "__shfl_up_sync", value, source, width, place);
}

#define LDMKIT_REDUCE(name, T, combine)                                                                   \
  inline T name(unsigned mask, T value, LDMKIT_PLACE) {                                                   \
    return ldmkit::emulation::reduce(mask, #name, value, ldmkit::emulation::Reduction::combine, place);   \
  }
LDMKIT_REDUCE(__reduce_add_sync, int, add)
LDMKIT_REDUCE(__reduce_add_sync, unsigned, add)
LDMKIT_REDUCE(__reduce_min_sync, int, least)
LDMKIT_REDUCE(__reduce_min_sync, unsigned, least)
LDMKIT_REDUCE(__reduce_max_sync, int, most)
LDMKIT_REDUCE(__reduce_max_sync, unsigned, most)
LDMKIT_REDUCE(__reduce_and_sync, unsigned, bit_and)
LDMKIT_REDUCE(__reduce_or_sync, unsigned, bit_or)
LDMKIT_REDUCE(__reduce_xor_sync, unsigned, bit_xor)
#undef LDMKIT_REDUCE

inline unsigned __ballot_sync(unsigned mask, int predicate, LDMKIT_PLACE) {
  const unsigned mine = predicate != 0 ? 1u << ldmkit::emulation::lane_id() : 0u;
  return ldmkit::emulation::reduce(mask, "__ballot_sync", mine, ldmkit::emulation::Reduction::bit_or, place);
}
inline int __any_sync(unsigned mask, int predicate, LDMKIT_PLACE) {
  return ldmkit::emulation::reduce(mask, "__any_sync", int(predicate != 0), ldmkit::emulation::Reduction::bit_or, place);
}
inline int __all_sync(unsigned mask, int predicate, LDMKIT_PLACE) {
  return ldmkit::emulation::reduce(mask, "__all_sync", int(predicate != 0), ldmkit::emulation::Reduction::bit_and, place);
}

namespace ldmkit::emulation {

// Threads run one at a time, so a plain read and write are atomic; the sanitizer is told by touch_atomic instead.
template <class T, class Change>
__attribute__((no_sanitize("thread"))) T atomic(T* at, Change change, const Place& place) {
  touch_atomic(at, sizeof(T), place);
  const T old = *at;
  *at = change(old);
  return old;
}

}  // namespace ldmkit::emulation

#define LDMKIT_ATOMIC(name, T, changed)                                             \
  inline T name(T* at, T value, LDMKIT_PLACE) {                                     \
    return ldmkit::emulation::atomic(at, [=](T old) -> T { return changed; }, place); \
  }
#define LDMKIT_ATOMICS(T)                                                           \
  LDMKIT_ATOMIC(atomicAdd, T, old + value)                                          \
  LDMKIT_ATOMIC(atomicMax, T, old < value ? value : old)                            \
  LDMKIT_ATOMIC(atomicMin, T, value < old ? value : old)                            \
  LDMKIT_ATOMIC(atomicOr, T, old | value)                                           \
  LDMKIT_ATOMIC(atomicAnd, T, old & value)                                          \
  LDMKIT_ATOMIC(atomicExch, T, (static_cast<void>(old), value))                     \
  inline T atomicCAS(T* at, T compare, T value, LDMKIT_PLACE) {                     \
    return ldmkit::emulation::atomic(at, [=](T old) -> T { return old == compare ? value : old; }, place); \
  }
LDMKIT_ATOMICS(int)
LDMKIT_ATOMICS(unsigned)
LDMKIT_ATOMICS(unsigned long long)
LDMKIT_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
#undef LDMKIT_ATOMICS
#undef LDMKIT_ATOMIC
