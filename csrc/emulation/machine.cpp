// Who runs next, and what is wrong when nobody can.
#include "machine.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace ldmkit::emulation {

Machine machine;

uint64_t Machine::draw() {  // splitmix64 (Steele, Lea and Flood 2014, figure 17)
  uint64_t z = random += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// One of the bits of a mask.
int Machine::choose(uint32_t mask) {
  if (schedule == Schedule::forward) return __builtin_ctz(mask);
  if (schedule == Schedule::reverse) return 31 - __builtin_clz(mask);
  const unsigned turn = draw() & 31;
  const uint32_t turned = mask >> turn | mask << (-turn & 31);
  return static_cast<int>((static_cast<unsigned>(__builtin_ctz(turned)) + turn) & 31);
}

void Machine::set_ready(int warp, uint32_t lanes) {
  warps[warp].ready |= lanes;
  ready_warps |= 1u << warp;
}

void Machine::set_waiting(const char* what, const Place& place) {
  self().waits_in = what;
  self().place = place;
  warp().ready &= ~(1u << current % 32);
  if (warp().ready == 0) ready_warps &= ~(1u << current / 32);
}

void Machine::leave(Fiber& from, Fiber& to) {
  ++switches;
  from.switch_to(to);
}

void Machine::run_next(Fiber& from) {
  if (ready_warps == 0) deadlock();
  const int warp = choose(ready_warps);
  current = 32 * warp + choose(warps[warp].ready);
  threadIdx = self().index;
  if (&self().fiber != &from) leave(from, self().fiber);
}

void Machine::yield() { run_next(self().fiber); }

void Machine::thread_ended() {
  const Place end = {"the end of the kernel", 0, 0};
  const uint32_t lane = 1u << current % 32;
  if (barrier.arrived > 0)
    fail(end, "divergent barrier: this thread ended while %d of %d wait in __syncthreads at %s", barrier.arrived, count,
         text(barrier.place).c_str());
  for (const Meeting& meeting : warp().meetings)
    if ((meeting.mask & lane) != 0)
      fail(end, "this thread ended while lanes of its warp wait for it in %s, mask 0x%08x, at %s", meeting.what, meeting.mask,
           text(meeting.place).c_str());
  warp().ended |= lane;
  --alive;
  set_waiting("its end", end);
}

void Machine::deadlock() {
  std::string who;
  const auto waits_alike = [&](int one, int other) {
    const Thread &a = *threads[static_cast<size_t>(one)], &b = *threads[static_cast<size_t>(other)];
    return a.waits_in == b.waits_in && same(a.place, b.place);
  };
  for (int i = 0; i < count; ++i) {
    int alike = 0, first = count;
    for (int other = count - 1; other >= 0; --other)
      if (waits_alike(i, other)) ++alike, first = other;
    const Thread& thread = *threads[static_cast<size_t>(i)];
    if (first == i)
      who += "\n  " + std::to_string(alike) + " threads, the first " + text(thread.index) + ", wait in " + thread.waits_in +
             " at " + text(thread.place);
  }
  give_up("deadlock: kernel " + kernel + ", block " + text(blockIdx) + ": no thread can go on" + who);
}

void Machine::give_up(std::string what) {
  failed = true;
  message = std::move(what);
  leave(self().fiber, *launcher);
  std::abort();  // nobody switches back
}

std::string text(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string text(const Place& place) {
  if (place.pc != 0) {  // testing/emulation.py looks these up
    char text[32];
    std::snprintf(text, sizeof(text), "+0x%zx", place.pc - image_begin());
    return text;
  }
  return place.line == 0 ? place.file : std::string(place.file) + ":" + std::to_string(place.line);
}

bool same(const Place& a, const Place& b) { return a.pc == b.pc && a.line == b.line && std::strcmp(a.file, b.file) == 0; }

void fail(const Place& place, const char* format, ...) {
  char what[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof(what), format, arguments);
  va_end(arguments);
  const std::string message = text(place) + ": kernel " + machine.kernel + ", block " + text(blockIdx) + ", thread " +
                              text(threadIdx) + ": " + what;
  if (machine.running) machine.give_up(message);
  std::fprintf(stderr, "emulated CUDA, outside a kernel: %s\n", message.c_str());  // in a launcher: nothing to return to
  std::abort();
}

int lane_id() { return machine.current % 32; }
int thread_rank() { return machine.current; }

}  // namespace ldmkit::emulation
