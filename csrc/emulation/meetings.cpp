// Threads that wait for one another: barriers, and the shuffles, votes and reductions of a warp.
#include <algorithm>

#include "machine.h"

namespace ldmkit::emulation {

Votes meet_block(int value, const Place& place) {
  Barrier& barrier = machine.barrier;
  const int ended = machine.count - machine.alive;
  if (ended > 0) fail(place, "divergent barrier: %d of %d threads ended before this __syncthreads", ended, machine.count);
  if (barrier.arrived == 0) {
    barrier.place = place;
  } else if (!same(barrier.place, place)) {
    fail(place, "divergent barrier: %d of %d threads wait in another __syncthreads, at %s", barrier.arrived, machine.count,
         text(barrier.place).c_str());
  }
  barrier.votes.sum += value != 0;
  barrier.votes.all &= value != 0;
  barrier.votes.any |= value != 0;
  machine.set_waiting("__syncthreads", place);
  if (++barrier.arrived == machine.count) {
    barrier = {0, place, {0, 1, 0}, barrier.votes};
    machine.synced = ++machine.now;
    for (int w = 0; 32 * w < machine.count; ++w) machine.set_ready(w, machine.warps[w].exists);
  }
  machine.yield();
  return barrier.result;  // the next barrier cannot be complete before this thread has come to it
}

void meet_warp(uint32_t mask, const char* what, void* offer, Complete complete, const Place& place) {
  Warp& warp = machine.warp();
  const int lane = lane_id();
  if ((mask >> lane & 1) == 0) fail(place, "%s with mask 0x%08x, in which the calling lane %d is not", what, mask, lane);
  const uint32_t absent = mask & ~warp.exists, ended = mask & warp.ended;
  if (absent != 0) fail(place, "%s with mask 0x%08x, of which the block has no lanes 0x%08x", what, mask, absent);
  if (ended != 0) fail(place, "%s with mask 0x%08x, of which lanes 0x%08x have ended", what, mask, ended);
  auto meeting = std::find_if(warp.meetings.begin(), warp.meetings.end(), [=](const Meeting& m) { return m.mask == mask; });
  if (meeting == warp.meetings.end()) meeting = warp.meetings.insert(meeting, {mask, 0, what, place, {}});
  if (meeting->what != what && std::strcmp(meeting->what, what) != 0)
    fail(place, "lanes of mask 0x%08x meet in %s, and in %s at %s", mask, what, meeting->what, text(meeting->place).c_str());
  meeting->arrived |= 1u << lane;
  meeting->offers[lane] = offer;
  machine.set_waiting(what, place);
  if (meeting->arrived == mask) {
    complete(meeting->offers, mask);
    warp.meetings.erase(meeting);
    machine.set_ready(machine.current / 32, mask);
  }
  machine.yield();
}

void sync_warp(uint32_t mask, const Place& place) {
  meet_warp(
      mask, "__syncwarp", nullptr,
      [](void* const(&)[32], uint32_t lanes) {
        Warp& warp = machine.warp();
        const uint32_t now = ++machine.now;
        if (lanes == warp.exists) {
          warp.synced = now;
          return;
        }
        for (int a = 0; a < 32; ++a)
          for (int b = 0; b < 32; ++b)
            if ((lanes >> a & lanes >> b & 1) != 0) warp.pairs[a][b] = now;
      },
      place);
}

namespace {

struct Shuffled {
  void* value;
  size_t bytes;
  int source;
};

template <class T>
T reduced(T x, T y, Reduction reduction) {
  switch (reduction) {
    case Reduction::add: return x + y;
    case Reduction::least: return std::min(x, y);
    case Reduction::most: return std::max(x, y);
    case Reduction::bit_and: return x & y;
    case Reduction::bit_or: return x | y;
    case Reduction::bit_xor: return x ^ y;
  }
  return x;
}

template <class T>
T reduce_lanes(uint32_t mask, const char* what, T value, Reduction reduction, const Place& place) {
  struct Offer {
    T value;
    Reduction reduction;
  } mine = {value, reduction};
  meet_warp(
      mask, what, &mine,
      [](void* const(&offers)[32], uint32_t lanes) {
        const auto offer = [&](uint32_t left) { return static_cast<Offer*>(offers[__builtin_ctz(left)]); };
        Offer total = *offer(lanes);
        for (uint32_t left = lanes & (lanes - 1); left != 0; left &= left - 1)
          total.value = reduced(total.value, offer(left)->value, total.reduction);
        for (uint32_t left = lanes; left != 0; left &= left - 1) *offer(left) = total;
      },
      place);
  return mine.value;
}

}  // namespace

void shuffle(uint32_t mask, const char* what, void* value, size_t bytes, int source, const Place& place) {
  Shuffled mine = {value, bytes, source};
  meet_warp(
      mask, what, &mine,
      [](void* const(&offers)[32], uint32_t lanes) {
        unsigned char values[32][16];
        const auto offer = [&](int lane) { return static_cast<Shuffled*>(offers[lane]); };
        const size_t bytes = offer(__builtin_ctz(lanes))->bytes;
        for (int lane = 0; lane < 32; ++lane) {
          std::memset(values[lane], 0xff, bytes);  // what the ISA leaves open must stand out
          if (offers[lane] != nullptr) std::memcpy(values[lane], offer(lane)->value, bytes);
        }
        for (uint32_t left = lanes; left != 0; left &= left - 1) {
          const Shuffled& to = *offer(__builtin_ctz(left));
          std::memcpy(to.value, values[to.source], bytes);
        }
      },
      place);
}

int reduce(uint32_t mask, const char* what, int value, Reduction reduction, const Place& place) {
  return reduce_lanes(mask, what, value, reduction, place);
}

unsigned reduce(uint32_t mask, const char* what, unsigned value, Reduction reduction, const Place& place) {
  return reduce_lanes(mask, what, value, reduction, place);
}

}  // namespace ldmkit::emulation
