// The emulated device's memory: while a call is on, its arguments may be read, and what it allocates may be written too.
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>

#include "../binding.h"
#include "runtime.h"

namespace ldmkit {
namespace {

// As torch's own for the CPU, but full of NaN, and known to the emulation.
struct DeviceAllocator final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    constexpr size_t kAlignment = 64;
    void* memory = bytes == 0 ? nullptr : std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    TORCH_CHECK(memory != nullptr || bytes == 0, "out of memory: ", bytes, " bytes");
    if (bytes > 0) {
      std::memset(memory, 0xff, bytes);
      ldmkit_emulation_map(memory, bytes, true, "a tensor the op allocated");
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

at::Allocator* host_allocator = nullptr;

void enter(const std::vector<at::Tensor>& arguments) {
  static DeviceAllocator allocator;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& storage = arguments[i].storage();
    const std::string name = "tensor argument " + std::to_string(i);
    if (storage.nbytes() > 0) ldmkit_emulation_map(storage.data(), storage.nbytes(), false, name.c_str());
  }
  host_allocator = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&allocator);
}

void leave() {
  c10::SetCPUAllocator(host_allocator);
  ldmkit_emulation_unmap(nullptr);
}

LDMKIT_BIND {
  module.def("enter_device", &enter);
  module.def("leave_device", &leave);
}

}  // namespace
}  // namespace ldmkit
