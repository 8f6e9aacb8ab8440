// The scheduler: which fiber runs, who waits for whom, and what is wrong when nobody can go on.
#include "runtime.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "fiber.h"

#ifdef LDMKIT_SANITIZED
#include <sanitizer/asan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace ldmkit::emulation {
namespace {

constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719;  // cudaError_t's
constexpr size_t kMostShared = 227 * 1024;                                          // of sm_90 and sm_100
constexpr int kMostThreads = 1024;

struct Copy {
  unsigned char* to;
  const unsigned char* from;  // null: zeros
  int bytes;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  const char* waits_in;  // null while it can run
  Place place;
  std::vector<std::vector<Copy>> copies{1};  // by group; the last one is open
};

// Lanes of one mask that are to meet. A lane leaves only when all have come, so a mask is never met twice at a time.
struct Meeting {
  uint32_t mask, arrived;
  const char* what;
  void* offers[32];
};

struct Warp {
  uint32_t exists, ready, ended;
  std::vector<Meeting> meetings;
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
  uint64_t seed = 0, random = 0, switches = 0, block_serial = 0;

  // This launch.
  const char* kernel;
  void (*body)(const void*);
  const void* closure;
  Fiber* launcher;
  unsigned char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  bool failed;
  std::string message;

  // This block.
  std::vector<std::unique_ptr<Thread>> threads;
  Warp warps[32];
  Barrier barrier;
  uint32_t ready_warps;
  int count, alive, current;
  std::vector<std::pair<unsigned char*, size_t>> shared;

  Machine() {
    const char* text = std::getenv("LDMKIT_EMULATION_SCHEDULE");
    if (text == nullptr || std::string(text) == "forward") return;
    unsigned long long number = 0;
    if (std::string(text) == "reverse") {
      schedule = Schedule::reverse;
    } else if (std::sscanf(text, "random:%llu", &number) == 1) {
      schedule = Schedule::random;
      seed = number;
    } else {
      std::fprintf(stderr, "LDMKIT_EMULATION_SCHEDULE is '%s'; it must be forward, reverse or random:SEED\n", text);
      std::abort();
    }
  }

  uint64_t draw() {  // splitmix64 (Steele et al. 2014)
    uint64_t z = random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  int choose(uint32_t mask) {
    if (schedule == Schedule::forward) return __builtin_ctz(mask);
    if (schedule == Schedule::reverse) return 31 - __builtin_clz(mask);
    const int turn = static_cast<int>(draw() & 31);
    const uint32_t turned = mask >> turn | (turn == 0 ? 0 : mask << (32 - turn));
    return (__builtin_ctz(turned) + turn) & 31;
  }

  Thread& self() { return *threads[current]; }
  Warp& warp() { return warps[current / 32]; }

  void set_ready(int warp, uint32_t lanes) {
    warps[warp].ready |= lanes;
    if (warps[warp].ready != 0) ready_warps |= 1u << warp;
    for (uint32_t left = lanes; left != 0; left &= left - 1) threads[32 * warp + __builtin_ctz(left)]->waits_in = nullptr;
  }

  void set_waiting(const char* what, const Place& place) {
    self().waits_in = what;
    self().place = place;
    warp().ready &= ~(1u << current % 32);
    if (warp().ready == 0) ready_warps &= ~(1u << current / 32);
  }

  void leave_to(Fiber& from, Fiber& to) {
    ++switches;
    from.switch_to(to);
  }

  // Runs another thread until this one is ready and chosen.
  void yield() {
    if (ready_warps == 0) deadlock();
    const int before = current;
    run_next(threads[before]->fiber);
  }

  void run_next(Fiber& from) {
    const int warp = choose(ready_warps);
    current = 32 * warp + choose(warps[warp].ready);
    Thread& next = self();
    threadIdx = next.index;
    if (&next.fiber != &from) leave_to(from, next.fiber);
  }

  [[noreturn]] void deadlock();
  void thread_ended();
};

Machine machine;

std::string text(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

bool same(const Place& a, const Place& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string text(const Place& place) { return std::string(place.file) + ":" + std::to_string(place.line); }

[[noreturn]] void give_up(std::string message) {
  machine.failed = true;
  machine.message = std::move(message);
  machine.leave_to(machine.self().fiber, *machine.launcher);
  std::abort();  // nobody switches back
}

void Machine::deadlock() {
  std::string who;
  for (int i = 0; i < count;) {
    const Thread& first = *threads[i];
    int last = i;
    while (last + 1 < count && threads[last + 1]->waits_in == first.waits_in &&
           (first.waits_in == nullptr || same(threads[last + 1]->place, first.place)))
      ++last;
    who += "\n  threads " + text(first.index) + " to " + text(threads[last]->index);
    who += first.waits_in == nullptr ? " have ended" : std::string(" wait in ") + first.waits_in + " at " + text(first.place);
    i = last + 1;
  }
  give_up("deadlock in kernel " + std::string(kernel) + ", block " + text(blockIdx) + ": no thread can go on" + who);
}

void Machine::thread_ended() {
  const uint32_t bit = 1u << current % 32;
  const Place nowhere = {"the end of the kernel", 0};
  if (barrier.arrived > 0)
    fail(nowhere, "divergent barrier: this thread ended while %d of %d threads wait in __syncthreads at %s:%d", barrier.arrived, count,
         barrier.place.file, barrier.place.line);
  for (const Meeting& meeting : warp().meetings)
    if (meeting.mask & bit) fail(nowhere, "this thread ended while lanes of its warp wait for it in %s, mask 0x%08x", meeting.what, meeting.mask);
  warp().ended |= bit;
  --alive;
  set_waiting(nullptr, nowhere);
}

// What every fiber runs, block after block.
void run_thread() {
  Fiber::arrived(*machine.launcher);
  for (;;) {
    machine.body(machine.closure);
    machine.thread_ended();
    Fiber& self = machine.self().fiber;
    if (machine.alive == 0) {
      machine.leave_to(self, *machine.launcher);
    } else if (machine.ready_warps == 0) {
      machine.deadlock();
    } else {
      machine.run_next(self);
    }
  }
}

void drop_copies(Thread& thread) {
#ifdef LDMKIT_SANITIZED
  for (const auto& group : thread.copies)
    for (const Copy& copy : group) __asan_unpoison_memory_region(copy.to, copy.bytes);
#endif
  thread.copies.assign(1, {});
}

void run_block(dim3 block) {
  const int count = machine.count = machine.alive = static_cast<int>(block.x * block.y * block.z);
  ++machine.block_serial;
  machine.shared.clear();
  if (machine.dynamic_bytes > 0) {
    std::memset(machine.dynamic, 0xff, machine.dynamic_bytes);
    machine.shared.emplace_back(machine.dynamic, machine.dynamic_bytes);
  }
  machine.barrier = {0, {"", 0}, {0, 1, 0}, {}};
  machine.ready_warps = 0;
  for (int i = 0; i < count; ++i) {
    if (i == static_cast<int>(machine.threads.size())) machine.threads.push_back(std::make_unique<Thread>());
    Thread& thread = *machine.threads[i];
    const unsigned rank = static_cast<unsigned>(i);
    thread.index = {rank % block.x, rank / block.x % block.y, rank / (block.x * block.y)};
    if (!thread.fiber.started()) thread.fiber.start(run_thread);
  }
  for (int w = 0; 32 * w < count; ++w) {
    const int lanes = std::min(32, count - 32 * w);
    machine.warps[w].exists = ~0u >> (32 - lanes);
    machine.warps[w].ended = 0;
    machine.warps[w].meetings.clear();
    machine.warps[w].ready = 0;
    machine.set_ready(w, machine.warps[w].exists);
  }
  machine.run_next(*machine.launcher);
  for (int i = 0; i < count; ++i) drop_copies(*machine.threads[i]);
}

// The i-th block to run: a permutation of 0 .. blocks - 1.
uint64_t block_in_order(uint64_t i, uint64_t blocks, uint64_t step, uint64_t offset) {
  if (machine.schedule == Schedule::forward) return i;
  if (machine.schedule == Schedule::reverse) return blocks - 1 - i;
  return static_cast<uint64_t>((static_cast<unsigned __int128>(i) * step + offset) % blocks);
}

}  // namespace

int launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* closure) {
  const std::lock_guard<std::mutex> guard(machine.mutex);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMostThreads || block.z > 64 || grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535 ||
      grid.z == 0 || grid.z > 65535)
    return kInvalidConfiguration;
  if (shared_bytes > kMostShared) return kInvalidValue;
  Fiber launcher;
  const std::unique_ptr<void, decltype(&std::free)> dynamic(std::malloc(shared_bytes), &std::free);
  machine.kernel = kernel;
  machine.body = body;
  machine.closure = closure;
  machine.launcher = &launcher;
  machine.dynamic = static_cast<unsigned char*>(dynamic.get());
  machine.dynamic_bytes = shared_bytes;
  machine.failed = false;
  machine.random = machine.seed;
  gridDim = grid;
  blockDim = block;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  uint64_t step = machine.draw() | 1;
  while (std::gcd(step, blocks) != 1) step += 2;
  const uint64_t offset = machine.draw() % blocks;
  for (uint64_t i = 0; i < blocks && !machine.failed; ++i) {
    const uint64_t b = block_in_order(i, blocks, step, offset);
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / (uint64_t(grid.x) * grid.y))};
    run_block(block);
  }
  if (!machine.failed) return 0;
  for (auto& thread : machine.threads) thread->fiber.abandon();
  return kLaunchFailure;
}

void fail(const Place& place, const char* format, ...) {
  char what[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof(what), format, arguments);
  va_end(arguments);
  give_up(text(place) + ": kernel " + machine.kernel + ", block " + text(blockIdx) + ", thread " + text(threadIdx) + ": " + what);
}

const char* last_failure() { return machine.message.c_str(); }

Votes meet_block(int value, const Place& place) {
  Barrier& barrier = machine.barrier;
  if (machine.alive < machine.count)
    fail(place, "divergent barrier: %d of %d threads ended before this __syncthreads", machine.count - machine.alive, machine.count);
  if (barrier.arrived == 0) {
    barrier.place = place;
  } else if (!same(barrier.place, place)) {
    fail(place, "divergent barrier: %d threads of the block wait in another __syncthreads, at %s:%d", barrier.arrived,
         barrier.place.file, barrier.place.line);
  }
  barrier.votes.sum += value != 0;
  barrier.votes.all &= value != 0;
  barrier.votes.any |= value != 0;
  machine.set_waiting("__syncthreads", place);
  if (++barrier.arrived == machine.count) {
    barrier = {0, place, {0, 1, 0}, barrier.votes};
    for (int w = 0; 32 * w < machine.count; ++w) machine.set_ready(w, machine.warps[w].exists);
  }
  machine.yield();
  return barrier.result;
}

void meet_warp(uint32_t mask, const char* what, void* offer, Complete complete, const Place& place) {
  Warp& warp = machine.warp();
  const int lane = lane_id();
  const uint32_t bit = 1u << lane;
  if ((mask & bit) == 0) fail(place, "%s with mask 0x%08x, in which the calling lane %d is not", what, mask, lane);
  if ((mask & ~warp.exists) != 0) fail(place, "%s with mask 0x%08x, but the warp has lanes 0x%08x only", what, mask, warp.exists);
  if ((mask & warp.ended) != 0) fail(place, "%s with mask 0x%08x, of which lanes 0x%08x have ended", what, mask, mask & warp.ended);
  size_t at = 0;
  while (at < warp.meetings.size() && warp.meetings[at].mask != mask) ++at;
  if (at == warp.meetings.size()) warp.meetings.push_back({mask, 0, what, {}});
  Meeting& meeting = warp.meetings[at];
  if (meeting.what != what && std::strcmp(meeting.what, what) != 0)
    fail(place, "lanes of mask 0x%08x meet in %s and in %s", mask, meeting.what, what);
  meeting.arrived |= bit;
  meeting.offers[lane] = offer;
  machine.set_waiting(what, place);
  if (meeting.arrived == mask) {
    complete(meeting.offers, mask);
    warp.meetings.erase(warp.meetings.begin() + static_cast<ptrdiff_t>(at));
    machine.set_ready(machine.current / 32, mask);
  }
  machine.yield();
}

int lane_id() { return machine.current % 32; }
int thread_rank() { return machine.current; }

SharedVariable::SharedVariable(size_t bytes) : memory_(static_cast<unsigned char*>(std::malloc(bytes))), bytes_(bytes) {}

void* SharedVariable::data() {
  if (block_ != machine.block_serial) {
    block_ = machine.block_serial;
    std::memset(memory_, 0xff, bytes_);
    machine.shared.emplace_back(memory_, bytes_);
  }
  return memory_;
}

unsigned char* dynamic_shared() { return machine.dynamic; }

void check_shared(const void* pointer, int bytes, const char* what, const Place& place) {
  const auto* from = static_cast<const unsigned char*>(pointer);
  for (const auto& [memory, size] : machine.shared)
    if (from >= memory && from + bytes <= memory + size) return;
  fail(place, "%s: %d bytes at %p are not in the block's shared memory", what, bytes, pointer);
}

void check_aligned(const void* pointer, int bytes, const char* what, const Place& place) {
  if (reinterpret_cast<uintptr_t>(pointer) % static_cast<unsigned>(bytes) != 0)
    fail(place, "%s: address %p is not aligned to %d bytes", what, pointer, bytes);
}

void check_readable([[maybe_unused]] const void* pointer, [[maybe_unused]] int bytes, [[maybe_unused]] const char* what,
                    [[maybe_unused]] const Place& place) {
#ifdef LDMKIT_SANITIZED
  if (__asan_region_is_poisoned(const_cast<void*>(pointer), static_cast<size_t>(bytes)) != nullptr)
    fail(place, "%s: out of bounds, or not yet copied: %d bytes at %p", what, bytes, pointer);
#endif
}

void cp_async(void* shared, const void* global, int bytes, bool valid, const Place& place) {
  check_shared(shared, bytes, "cp.async's destination", place);
  check_aligned(shared, bytes, "cp.async's destination", place);
  if (valid) {
    check_aligned(global, bytes, "cp.async's source", place);
    check_readable(global, bytes, "cp.async's source", place);
  }
  auto* to = static_cast<unsigned char*>(shared);
  std::memset(to, 0xff, static_cast<size_t>(bytes));
#ifdef LDMKIT_SANITIZED
  __asan_poison_memory_region(to, static_cast<size_t>(bytes));
#endif
  machine.self().copies.back().push_back({to, valid ? static_cast<const unsigned char*>(global) : nullptr, bytes});
}

void cp_async_commit() { machine.self().copies.emplace_back(); }

void cp_async_wait(int groups_left) {
  auto& copies = machine.self().copies;
  while (static_cast<int>(copies.size()) > groups_left + 1) {  // the open group is not waited for
    for (const Copy& copy : copies.front()) {
#ifdef LDMKIT_SANITIZED
      __asan_unpoison_memory_region(copy.to, static_cast<size_t>(copy.bytes));
#endif
      if (copy.from == nullptr) {
        std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
      } else {
        std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
      }
    }
    copies.erase(copies.begin());
  }
}

}  // namespace ldmkit::emulation

bool ldmkit_emulation_schedule(int kind, uint64_t seed) {
  using namespace ldmkit::emulation;
  if (kind < 0 || kind > 2) return false;
  const std::lock_guard<std::mutex> guard(machine.mutex);
  machine.schedule = static_cast<Schedule>(kind);
  machine.seed = seed;
  return true;
}

uint64_t ldmkit_emulation_switches() { return ldmkit::emulation::machine.switches; }
