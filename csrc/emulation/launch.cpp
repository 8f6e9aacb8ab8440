// Running a grid: block after block, each as a fiber per thread.
#include <algorithm>
#include <numeric>

#include "machine.h"
#include "memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace ldmkit::emulation {

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
  ++machine.block_serial;
  memory_for_block();
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
