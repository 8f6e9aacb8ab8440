// Running a grid: blocks in order, the threads of each by the schedule, and what is wrong when none can go on.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "machine.h"
#include "memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

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
  for (uint32_t left = lanes; left != 0; left &= left - 1)
    threads[static_cast<size_t>(32 * warp + __builtin_ctz(left))]->waits_in = nullptr;
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
      who += "\n  " + std::to_string(alike) + " threads, the first " + text(thread.index) + ", wait in " + thread.waits_in + " at " +
             text(thread.place);
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

namespace {

// What every fiber runs, block after block.
void run_thread() {
  for (;;) {
    machine.body(machine.closure);
    machine.thread_ended();
    Fiber& self = machine.self().fiber;
    if (machine.alive == 0) {
      machine.leave(self, *machine.launcher);
    } else {
      machine.run_next(self);
    }
  }
}

void run_block(dim3 block) {
  machine.count = machine.alive = static_cast<int>(block.x * block.y * block.z);
  machine.barrier = {0, {"", 0, 0}, {0, 1, 0}, {}};
  machine.synced = ++machine.now;
  memory_for_block(++machine.block_serial);
  for (unsigned rank = 0; static_cast<int>(rank) < machine.count; ++rank) {
    if (rank == machine.threads.size()) machine.threads.push_back(std::make_unique<Thread>());
    Thread& thread = *machine.threads[rank];
    thread.index = {rank % block.x, rank / block.x % block.y, rank / (block.x * block.y)};
    thread.copies.clear();
    if (!thread.fiber.started()) thread.fiber.start(run_thread);
  }
  machine.ready_warps = 0;
  for (int w = 0; 32 * w < machine.count; ++w) {
    Warp& warp = machine.warps[w];
    warp.exists = ~0u >> (32 - std::min(32, machine.count - 32 * w));
    warp.ready = warp.ended = 0;
    warp.meetings.clear();
    machine.set_ready(w, warp.exists);
  }
  machine.running = true;
  machine.run_next(*machine.launcher);
  machine.running = false;
}

// The order of blocks: i => a permutation of 0 .. blocks - 1.
struct BlockOrder {
  uint64_t blocks, step, offset;
  explicit BlockOrder(uint64_t blocks) : blocks(blocks), step(machine.draw() | 1), offset(machine.draw() % blocks) {
    while (std::gcd(step, blocks) != 1) step += 2;
  }
  uint64_t operator()(uint64_t i) const {
    if (machine.schedule == Schedule::forward) return i;
    if (machine.schedule == Schedule::reverse) return blocks - 1 - i;
    return static_cast<uint64_t>((static_cast<unsigned __int128>(i) * step + offset) % blocks);
  }
};

bool fits_a_gpu(dim3 grid, dim3 block) {  // CUDA C++ Programming Guide, "Technical specifications per compute capability"
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  return threads > 0 && threads <= 1024 && block.x <= 1024 && block.y <= 1024 && block.z <= 64 && grid.x > 0 &&
         grid.x <= 0x7fffffff && grid.y > 0 && grid.y <= 65535 && grid.z > 0 && grid.z <= 65535;
}

}  // namespace

int launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* closure,
           size_t closure_bytes) {
  const std::lock_guard<std::mutex> guard(machine.mutex);
  if (!fits_a_gpu(grid, block)) return cudaErrorInvalidConfiguration;
  if (shared_bytes > kMostShared) return cudaErrorInvalidValue;
  Fiber launcher;
  machine.kernel = kernel[0] == '(' ? std::string(kernel + 1, std::strlen(kernel) - 2) : kernel;  // LAUNCH((kernel<T, 8>), ...)
  machine.body = body;
  machine.closure = closure;
  machine.launcher = &launcher;
  machine.failed = false;
  machine.random = machine.seed;
  gridDim = grid;
  blockDim = block;
  memory_for_launch(closure, closure_bytes, shared_bytes);
  const BlockOrder order(uint64_t(grid.x) * grid.y * grid.z);
  for (uint64_t i = 0; i < order.blocks && !machine.failed; ++i) {
    const uint64_t b = order(i), row = b / grid.x;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(row % grid.y), static_cast<unsigned>(row / grid.y)};
    run_block(block);
  }
  if (!machine.failed) return 0;
  for (const auto& thread : machine.threads) thread->fiber.abandon();
  return cudaErrorLaunchFailure;
}

}  // namespace ldmkit::emulation

using ldmkit::emulation::machine;

void ldmkit_emulation_schedule(int kind, uint64_t seed) {
  const std::lock_guard<std::mutex> guard(machine.mutex);
  machine.schedule = static_cast<ldmkit::emulation::Schedule>(kind);
  machine.seed = seed;
}

const char* ldmkit_emulation_error(int code) {
  switch (code) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration: a grid or block that no GPU can run";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorLaunchFailure: return machine.message.c_str();
    default: return "unknown error";
  }
}

uint64_t ldmkit_emulation_switches() { return machine.switches; }
