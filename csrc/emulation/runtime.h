// The machine that csrc/emulation's CUDA headers run on: one fiber per CUDA thread, all on one thread of the host. Blocks run
// one after another; a thread runs until it must wait for others (barrier, shuffle, ...), and the schedule picks who goes on. A
// mistake that a GPU would answer with a hang, a trap or silence ends the launch with an error code; cudaGetErrorString says
// what and where.
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

constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719,
              cudaErrorNotSupported = 801;

// Set at every switch; kernels only read them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace ldmkit::emulation {

// Where a kernel stands: a line of the source or, where that is all there is, an address in the code.
struct Place {
  const char* file;
  int line;
  uintptr_t pc;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line, 0}; }
};
// A function's last parameter: the line that calls it.
#define LDMKIT_PLACE const ::ldmkit::emulation::Place& place = ::ldmkit::emulation::Place::here()

template <class T>
using Identity = T;

// Runs body(closure) as every thread of every block => 0, or a cudaError_t (cudaErrorLaunchFailure has a message).
int launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* closure,
           size_t closure_bytes);

template <class... Parameters, class... Arguments>
int launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void* /*stream*/, void (*kernel)(Parameters...),
           Arguments... arguments) {
  const auto closure = [=] { kernel(static_cast<Parameters>(arguments)...); };
  const auto body = [](const void* self) { (*static_cast<const decltype(closure)*>(self))(); };
  return launch(name, grid, block, shared_bytes, body, &closure, sizeof(closure));
}

// Ends the launch with this message, in which the calling thread of the kernel is named; does not return.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const Place& place, const char* format, ...);

int lane_id();
int thread_rank();

// __syncthreads: returns once every thread of the block is here, with the votes on `value`. Orders memory.
struct Votes {
  int sum, all, any;
};
Votes meet_block(int value, const Place& place);

// __syncwarp: returns once every lane of the mask is here. Orders memory, which shuffles and votes do not.
void sync_warp(uint32_t mask, const Place& place);

// Every lane of the mask brings `bytes` at `value`, and takes those of lane `source` (garbage if that is not in the mask).
void shuffle(uint32_t mask, const char* what, void* value, size_t bytes, int source, const Place& place);

// Every lane of the mask gets the reduction of all its lanes' values.
enum class Reduction { add, least, most, bit_and, bit_or, bit_xor };
int reduce(uint32_t mask, const char* what, int value, Reduction reduction, const Place& place);
unsigned reduce(uint32_t mask, const char* what, unsigned value, Reduction reduction, const Place& place);

// Static shared memory: alive while a block runs, full of NaN (0xff) when it starts.
class SharedVariable {
 public:
  explicit SharedVariable(size_t bytes, LDMKIT_PLACE);
  void* data();

 private:
  unsigned char* memory_;
  size_t bytes_;
  Place place_;
  void* history_ = nullptr;
  uint32_t block_ = 0;
};
unsigned char* dynamic_shared();

// Before an atomic operation on memory; __threadfence.
void touch_atomic(void* at, size_t bytes, const Place& place);
void fence();

// The destination is full of NaN, and nobody's to touch, until this thread's cp_async_wait; only then the source is read.
void cp_async(void* shared, const void* global, size_t bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int groups_left);

// Bodies of the wrappers in common.cuh, which documents them.
void ldmatrix(uint32_t* r, const void* row, int matrices, bool transposed);
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_half);
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
uint32_t to_tf32(float x);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
float bfloat16_to_float(uint16_t bits);
uint16_t float_to_bfloat16(float value);

}  // namespace ldmkit::emulation

// For tests, which load the library. Who goes on when a thread waits: 0 the first that can (the default), 1 the last, 2 any, by
// seed; blocks are ordered alike.
#define LDMKIT_EXPORT extern "C" __attribute__((visibility("default")))
LDMKIT_EXPORT void ldmkit_emulation_schedule(int kind, uint64_t seed);
// Lets kernels touch memory of the host, until it is unmapped (null: all of it). In a sanitized build they may touch no other.
LDMKIT_EXPORT void ldmkit_emulation_map(const void* memory, size_t bytes, bool writable, const char* name);
LDMKIT_EXPORT void ldmkit_emulation_unmap(const void* memory);
// What a launcher's code means, and of the last launch that failed where and why.
LDMKIT_EXPORT const char* ldmkit_emulation_error(int code);
// How often fibers were switched since the library was loaded.
LDMKIT_EXPORT uint64_t ldmkit_emulation_switches();
