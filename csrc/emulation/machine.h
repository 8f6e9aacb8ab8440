// The state of the machine, shared by the files beside this one. One launch at a time has it.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "fiber.h"
#include "runtime.h"

namespace ldmkit::emulation {

struct Copy {  // a cp.async under way
  int group;
  unsigned char* to;
  const unsigned char* from;  // null: zeros
  size_t bytes;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  const char* waits_in;  // where it waits, unless it is ready
  Place place;
  int groups = 0;        // of cp.async, closed so far
  std::vector<Copy> copies;
};

// Lanes of one mask that are to meet. A lane leaves only when all have come, so a mask never meets twice at a time.
struct Meeting {
  uint32_t mask, arrived;
  const char* what;
  Place place;  // of the lane that came first
  void* offers[32];
};

struct Warp {
  uint32_t exists, ready, ended;
  std::vector<Meeting> meetings;
  uint32_t synced;            // when all lanes last met in __syncwarp
  uint32_t pairs[32][32];     // when these two lanes last did
};

struct Barrier {
  int arrived;
  Place place;
  Votes votes, result;
};

enum class Schedule { forward, reverse, random };

struct Machine {
  std::mutex mutex;
  Schedule schedule = Schedule::forward;
  uint64_t seed = 0, random = 0, switches = 0;

  // This launch.
  std::string kernel;
  void (*body)(const void*) = nullptr;
  const void* closure = nullptr;
  Fiber* launcher = nullptr;
  bool running = false;  // fibers are: code of a kernel, not of a launcher
  bool failed = false;
  std::string message;

  // This block. `now` counts the events that order memory; `synced` is when the last __syncthreads was.
  uint32_t block_serial = 0, now = 0, synced = 0;
  std::vector<std::unique_ptr<Thread>> threads;
  Warp warps[32];
  Barrier barrier;
  uint32_t ready_warps = 0;
  int count = 0, alive = 0, current = 0;

  Thread& self() { return *threads[static_cast<size_t>(current)]; }
  Warp& warp() { return warps[current / 32]; }

  void set_ready(int warp, uint32_t lanes);
  void set_waiting(const char* what, const Place& place);  // the current thread
  void yield();                                            // runs others until the current thread is ready and chosen
  void run_next(Fiber& from);
  void leave(Fiber& from, Fiber& to);
  void thread_ended();
  [[noreturn]] void deadlock();
  [[noreturn]] void give_up(std::string message);

 private:
  int choose(uint32_t mask);

 public:
  uint64_t draw();
};

extern Machine machine;

// In a function that kernels call: where they do.
#define LDMKIT_CALLER (::ldmkit::emulation::Place{"", 0, reinterpret_cast<uintptr_t>(__builtin_return_address(0))})

std::string text(const uint3& v);
std::string text(const Place& place);
bool same(const Place& a, const Place& b);
uintptr_t image_begin();  // of this library

// Every lane of the mask brings an offer; the last to come calls complete(offers, mask); null are the offers outside the mask.
using Complete = void (*)(void* const (&offers)[32], uint32_t mask);
void meet_warp(uint32_t mask, const char* what, void* offer, Complete complete, const Place& place);

}  // namespace ldmkit::emulation
