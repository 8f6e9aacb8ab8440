// The emulated device's memory: while a call is on, what torch allocates is the op's to write, and known to the emulation.
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>
#include <thread>

#include "runtime.h"

namespace {

at::Allocator* host_allocator = nullptr;
std::thread::id caller;  // other threads of the process allocate as ever

// As torch's own for the CPU, but full of NaN.
struct DeviceAllocator final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    if (std::this_thread::get_id() != caller) return host_allocator->allocate(bytes);
    constexpr size_t kAlignment = 64;
    void* memory = bytes == 0 ? nullptr : std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    TORCH_CHECK(memory != nullptr || bytes == 0, "out of memory: ", bytes, " bytes");
    if (bytes > 0) {
      std::memset(memory, 0xff, bytes);
      ldmkit_emulation_map(memory, bytes, true, "a tensor of the op's own");
    }
    return {memory, memory, &free, at::Device(at::DeviceType::CPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  static void free(void* memory) {
    if (memory == nullptr) return;
    ldmkit_emulation_unmap(memory);
    std::free(memory);
  }
};

}  // namespace

LDMKIT_EXPORT void ldmkit_emulation_enter() {
  static DeviceAllocator allocator;
  host_allocator = c10::GetCPUAllocator();
  caller = std::this_thread::get_id();
  c10::SetCPUAllocator(&allocator);
}

LDMKIT_EXPORT void ldmkit_emulation_leave() {
  c10::SetCPUAllocator(host_allocator);
  ldmkit_emulation_unmap(nullptr);
}
