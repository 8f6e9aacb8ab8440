// The machine that csrc/emulation's CUDA headers run on: one fiber per CUDA thread, on one thread of the host. Blocks run one after
// another; a thread runs until it must wait for others (barrier, shuffle, ...), and the schedule picks who goes on. A mistake that a
// GPU would answer with a hang, a trap or silence ends the launch with an error code; cudaGetErrorString says what and where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Set at every switch; kernels only read them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace ldmkit::emulation {

// Where in the source a kernel stands: `const Place& place = Place::here()` as a last argument.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

template <class T>
using Identity = T;

// Runs body(closure) as every thread of every block => 0, or 719 (cudaErrorLaunchFailure) and a message.
int launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* closure);

template <class... Parameters, class... Arguments>
int launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void* /*stream*/, void (*kernel)(Parameters...),
           Arguments... arguments) {
  const auto closure = [=] { kernel(static_cast<Parameters>(arguments)...); };
  return launch(name, grid, block, shared_bytes, [](const void* self) { (*static_cast<const decltype(closure)*>(self))(); }, &closure);
}

// Ends the launch with this message; does not return. The calling thread of the kernel is named beside it.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const Place& place, const char* format, ...);

// The message of the last launch that failed.
const char* last_failure();

// __syncthreads: returns once every thread of the block is here; the sum, conjunction and disjunction of `value` over the block.
struct Votes {
  int sum, all, any;
};
Votes meet_block(int value, const Place& place);

// Warps. Every lane of `mask` brings `offer`; the last to come calls complete(offers, mask), offers[lane] null outside the mask.
using Complete = void (*)(void* const (&offers)[32], uint32_t mask);
void meet_warp(uint32_t mask, const char* what, void* offer, Complete complete, const Place& place);
int lane_id();
int thread_rank();

// Shared memory, alive while a block runs and full of NaN (0xff) when it starts.
class SharedVariable {
 public:
  explicit SharedVariable(size_t bytes);
  void* data();

 private:
  unsigned char* memory_;
  size_t bytes_;
  uint64_t block_ = 0;
};
unsigned char* dynamic_shared();

// The destination is full of NaN, and out of bounds to AddressSanitizer, until this thread's cp_async_wait.
void cp_async(void* shared, const void* global, int bytes, bool valid, const Place& place = Place::here());
void cp_async_commit();
void cp_async_wait(int groups_left);

// Bodies of ldmkit's wrappers in common.cuh, which document them.
void ldmatrix(uint32_t* r, const void* row, int matrices, bool transposed, const Place& place = Place::here());
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_half, const Place& place = Place::here());
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Place& place = Place::here());
uint32_t to_tf32(float x);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
float bfloat16_to_float(uint16_t bits);
uint16_t float_to_bfloat16(float value);

}  // namespace ldmkit::emulation

// Which thread goes on when one waits: 0 the first, 1 the last, 2 any (by seed); blocks are ordered alike. Until it is called,
// LDMKIT_EMULATION_SCHEDULE decides: "forward" (the default), "reverse" or "random:SEED". False for an unknown kind.
extern "C" bool ldmkit_emulation_schedule(int kind, uint64_t seed);
// How often fibers were switched since the library was loaded.
extern "C" uint64_t ldmkit_emulation_switches();
