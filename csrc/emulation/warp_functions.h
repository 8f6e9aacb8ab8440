// Barriers, shuffles, votes, reductions over a warp, and integer atomics. There are no float atomics: their result depends on the
// order of threads, and a kernel of ours that used one must not compile.
#pragma once

#include "runtime.h"

namespace ldmkit::emulation {

// Runs result_of(lane, offers of all lanes) for every lane of the mask, once all are here.
template <class Offer>
struct Exchange {
  Offer offer;
  decltype(Offer::value) result;
};

template <class Offer>
auto exchange(uint32_t mask, const char* what, const Offer& offer, const Place& place) {
  Exchange<Offer> mine{offer, {}};
  meet_warp(
      mask, what, &mine,
      [](void* const(&offers)[32], uint32_t) {
        for (int lane = 0; lane < 32; ++lane) {
          auto* self = static_cast<Exchange<Offer>*>(offers[lane]);
          if (self == nullptr) continue;
          auto* from = static_cast<Exchange<Offer>*>(offers[self->offer.source]);
          if (from == nullptr) {  // the ISA leaves the value open: make it stand out
            std::memset(static_cast<void*>(&self->result), 0xff, sizeof(self->result));
          } else {
            self->result = from->offer.value;
          }
        }
      },
      place);
  return mine.result;
}

template <class T>
struct FromLane {
  T value;
  int source;
};

// The value of lane `source`, which was counted within segments of `width` lanes; out of the segment: one's own.
template <class T>
T shuffle(uint32_t mask, const char* what, T value, int source, int width, const Place& place) {
  const int lane = lane_id(), first = lane / width * width;
  const bool inside = source >= first && source < first + width;
  return exchange(mask, what, FromLane<T>{value, inside ? source : lane}, place);
}

template <class T, class Combine>
T reduce(uint32_t mask, const char* what, T value, Combine, const Place& place) {
  T mine = value;
  meet_warp(
      mask, what, &mine,
      [](void* const(&offers)[32], uint32_t lanes) {
        T total = *static_cast<T*>(offers[__builtin_ctz(lanes)]);
        for (uint32_t left = lanes & (lanes - 1); left != 0; left &= left - 1)
          total = Combine()(total, *static_cast<T*>(offers[__builtin_ctz(left)]));
        for (uint32_t left = lanes; left != 0; left &= left - 1) *static_cast<T*>(offers[__builtin_ctz(left)]) = total;
      },
      place);
  return mine;
}

struct Add {
  template <class T>
  T operator()(T x, T y) const { return x + y; }
};
struct Least {
  template <class T>
  T operator()(T x, T y) const { return y < x ? y : x; }
};
struct Most {
  template <class T>
  T operator()(T x, T y) const { return x < y ? y : x; }
};
struct BitAnd {
  template <class T>
  T operator()(T x, T y) const { return x & y; }
};
struct BitOr {
  template <class T>
  T operator()(T x, T y) const { return x | y; }
};
struct BitXor {
  template <class T>
  T operator()(T x, T y) const { return x ^ y; }
};

}  // namespace ldmkit::emulation

#define LDMKIT_PLACE const ::ldmkit::emulation::Place& place = ::ldmkit::emulation::Place::here()

inline void __syncthreads(LDMKIT_PLACE) { ldmkit::emulation::meet_block(0, place); }
inline int __syncthreads_count(int x, LDMKIT_PLACE) { return ldmkit::emulation::meet_block(x, place).sum; }
inline int __syncthreads_and(int x, LDMKIT_PLACE) { return ldmkit::emulation::meet_block(x, place).all; }
inline int __syncthreads_or(int x, LDMKIT_PLACE) { return ldmkit::emulation::meet_block(x, place).any; }
inline void __syncwarp(unsigned mask = ~0u, LDMKIT_PLACE) {
  ldmkit::emulation::meet_warp(mask, "__syncwarp", nullptr, [](void* const(&)[32], uint32_t) {}, place);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, LDMKIT_PLACE) {
  const int first = ldmkit::emulation::lane_id() / width * width;
  return ldmkit::emulation::shuffle(mask, "__shfl_sync", value, first + (source & (width - 1)), width, place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, LDMKIT_PLACE) {
  return ldmkit::emulation::shuffle(mask, "__shfl_xor_sync", value, ldmkit::emulation::lane_id() ^ bits, width, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, LDMKIT_PLACE) {
  const int source = ldmkit::emulation::lane_id() + static_cast<int>(delta);
  return ldmkit::emulation::shuffle(mask, "__shfl_down_sync", value, source, width, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, LDMKIT_PLACE) {
  const int source = ldmkit::emulation::lane_id() - static_cast<int>(delta);
  return ldmkit::emulation::shuffle(mask, "__shfl_up_sync", value, source, width, place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, LDMKIT_PLACE) {
  const unsigned mine = predicate != 0 ? 1u << ldmkit::emulation::lane_id() : 0u;
  return ldmkit::emulation::reduce(mask, "__ballot_sync", mine, ldmkit::emulation::BitOr(), place);
}
inline int __any_sync(unsigned mask, int predicate, LDMKIT_PLACE) {
  return ldmkit::emulation::reduce(mask, "__any_sync", int(predicate != 0), ldmkit::emulation::BitOr(), place);
}
inline int __all_sync(unsigned mask, int predicate, LDMKIT_PLACE) {
  return ldmkit::emulation::reduce(mask, "__all_sync", int(predicate != 0), ldmkit::emulation::BitAnd(), place);
}
#define LDMKIT_REDUCE(name, T, Combine)                                         \
  inline T name(unsigned mask, T value, LDMKIT_PLACE) {                         \
    return ldmkit::emulation::reduce(mask, #name, value, ldmkit::emulation::Combine(), place); \
  }
LDMKIT_REDUCE(__reduce_add_sync, int, Add)
LDMKIT_REDUCE(__reduce_add_sync, unsigned, Add)
LDMKIT_REDUCE(__reduce_min_sync, int, Least)
LDMKIT_REDUCE(__reduce_min_sync, unsigned, Least)
LDMKIT_REDUCE(__reduce_max_sync, int, Most)
LDMKIT_REDUCE(__reduce_max_sync, unsigned, Most)
LDMKIT_REDUCE(__reduce_and_sync, unsigned, BitAnd)
LDMKIT_REDUCE(__reduce_or_sync, unsigned, BitOr)
LDMKIT_REDUCE(__reduce_xor_sync, unsigned, BitXor)
#undef LDMKIT_REDUCE

// Threads run one at a time, so plain reads and writes are atomic.
#define LDMKIT_ATOMICS(T)                                                                      \
  inline T atomicAdd(T* at, T value) { const T old = *at; *at = old + value; return old; }     \
  inline T atomicMax(T* at, T value) { const T old = *at; *at = old < value ? value : old; return old; } \
  inline T atomicMin(T* at, T value) { const T old = *at; *at = value < old ? value : old; return old; } \
  inline T atomicOr(T* at, T value) { const T old = *at; *at = old | value; return old; }      \
  inline T atomicAnd(T* at, T value) { const T old = *at; *at = old & value; return old; }     \
  inline T atomicExch(T* at, T value) { const T old = *at; *at = value; return old; }          \
  inline T atomicCAS(T* at, T compare, T value) { const T old = *at; if (old == compare) *at = value; return old; }
LDMKIT_ATOMICS(int)
LDMKIT_ATOMICS(unsigned)
LDMKIT_ATOMICS(unsigned long long)
#undef LDMKIT_ATOMICS
inline unsigned atomicInc(unsigned* at, unsigned last) {
  const unsigned old = *at;
  *at = old >= last ? 0 : old + 1;
  return old;
}
