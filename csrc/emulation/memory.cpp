#include "memory.h"

#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "history.h"
#include "machine.h"

namespace ldmkit::emulation {
namespace {

uintptr_t address_of(const void* at) { return reinterpret_cast<uintptr_t>(at); }

struct Memory {
  std::mutex mutex;            // of `mapped`, between launches
  std::vector<Region> mapped;  // tensors
  std::vector<Region> locals;  // parameters and shared memory
  size_t statics = 0;          // locals from here on are the block's static variables
  unsigned char* dynamic = static_cast<unsigned char*>(std::aligned_alloc(128, kMostShared + 256)) + 16;  // aligned to 16 alone
  History* dynamic_history = new_history(kMostShared);
  uintptr_t image_begin = 0, image_end = 0;

  Memory() { dl_iterate_phdr(&find_image, this); }

  // This library, whose constants kernels read.
  static int find_image(dl_phdr_info* info, size_t, void* self) {
    uintptr_t begin = ~uintptr_t(0), end = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
      begin = std::min(begin, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
      end = std::max(end, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
    }
    if (address_of(self) < begin || address_of(self) >= end) return 0;
    static_cast<Memory*>(self)->image_begin = begin;
    static_cast<Memory*>(self)->image_end = end;
    return 1;
  }

  Region* find(uintptr_t at, size_t bytes) {
    for (auto* regions : {&locals, &mapped})
      for (Region& region : *regions)
        if (at >= region.begin && at + bytes <= region.end) return &region;
    return nullptr;
  }
};

Memory memory;

// ", 12 bytes past the end of y (512 bytes)", by the region that is nearest.
std::string describe(uintptr_t at, size_t bytes) {
  const Region* nearest = nullptr;
  uintptr_t least = ~uintptr_t(0);
  for (const auto* regions : {&memory.locals, &memory.mapped})
    for (const Region& region : *regions) {
      const uintptr_t distance = at < region.begin ? region.begin - at : at >= region.end ? at - region.end : 0;
      if (distance < least) least = distance, nearest = &region;
    }
  if (nearest == nullptr || least > 1 << 20) return " of memory that is no tensor, parameter or shared memory of this kernel";
  const std::string whole = nearest->name + " (" + std::to_string(nearest->end - nearest->begin) + " bytes)";
  if (at < nearest->begin) return ", beginning " + std::to_string(nearest->begin - at) + " before " + whole;
  if (at >= nearest->end) return ", beginning " + std::to_string(at - nearest->end) + " past the end of " + whole;
  return ", " + std::to_string(at + bytes - nearest->end) + " of them past the end of " + whole;
}

}  // namespace

void memory_for_launch(const void* parameters, size_t parameter_bytes, size_t shared_bytes) {
  order_for_launch();
  memory.locals.clear();
  const uintptr_t begin = address_of(parameters), dynamic = address_of(memory.dynamic);
  memory.locals.push_back({dynamic, dynamic + shared_bytes, true, true, "dynamic shared memory", memory.dynamic_history});
  memory.locals.push_back({begin, begin + parameter_bytes, false, false, "the kernel's parameters", nullptr});
  memory.statics = memory.locals.size();
}

void memory_for_block() {
  order_for_block();
  memory.locals.resize(memory.statics);
  std::memset(memory.dynamic, 0xff, memory.locals[0].end - memory.locals[0].begin);
}

void check_access(const void* pointer, size_t bytes, bool writes, const Place& place) {
  const uintptr_t at = address_of(pointer);
  if (!kSanitized || !machine.running || machine.self().fiber.on_stack(at)) return;
  const Region* region = memory.find(at, bytes);
  const char* verb = writes ? "writes" : "reads";
  if (region == nullptr) {
    if (!writes && at >= memory.image_begin && at + bytes <= memory.image_end) return;
    fail(place, "out of bounds: it %s %zu bytes%s", verb, bytes, describe(at, bytes).c_str());
  }
  if (writes && !region->writable)
    fail(place, "it writes byte %zu of %s, which is not its to change", at - region->begin, region->name.c_str());
  if (region->history == nullptr) return;
  for (size_t i = (at - region->begin) / 2; i <= (at + bytes - 1 - region->begin) / 2; ++i)
    record(*region, region->begin + 2 * i, writes, region->history[i], place);
}

void check_shared(const void* pointer, size_t bytes, const char* what, const Place& place) {
  const Region* region = memory.find(address_of(pointer), bytes);
  if (region == nullptr || !region->shared) fail(place, "%s: %zu bytes that are not in the block's shared memory", what, bytes);
}

void check_aligned(const void* pointer, size_t bytes, const char* what, const Place& place) {
  if (address_of(pointer) % bytes != 0) fail(place, "%s: the address is not aligned to %zu bytes", what, bytes);
}

void reserve(const void* pointer, size_t bytes, bool reserved) {
  const Region* region = memory.find(address_of(pointer), bytes);
  if (region->history == nullptr) return;
  for (size_t i = 0; i < bytes / 2; ++i) region->history[(address_of(pointer) - region->begin) / 2 + i].reserved = reserved;
}

void touch_atomic(void* at, size_t bytes, const Place& place) {
  order_by_atomic();
  const Region* region = memory.find(address_of(at), bytes);
  if (kSanitized && (region == nullptr || !region->writable))
    fail(place, "out of bounds: an atomic operation on %zu bytes%s", bytes, describe(address_of(at), bytes).c_str());
}

uintptr_t image_begin() { return memory.image_begin; }

unsigned char* dynamic_shared() { return memory.dynamic; }

SharedVariable::SharedVariable(size_t bytes, const Place& place)
    : memory_(static_cast<unsigned char*>(std::malloc(bytes))), bytes_(bytes), place_(place), history_(new_history(bytes)) {}

void* SharedVariable::data() {
  if (block_ != machine.block_serial) {
    block_ = machine.block_serial;
    std::memset(memory_, 0xff, bytes_);
    const uintptr_t begin = address_of(memory_);
    const std::string name = "the shared variable at " + text(place_);
    memory.locals.push_back({begin, begin + bytes_, true, true, name, static_cast<History*>(history_)});
  }
  return memory_;
}

}  // namespace ldmkit::emulation

using ldmkit::emulation::memory;

void ldmkit_emulation_map(const void* pointer, size_t bytes, bool writable, const char* name) {
  const std::lock_guard<std::mutex> guard(memory.mutex);
  const uintptr_t begin = ldmkit::emulation::address_of(pointer);
  auto* history = writable ? ldmkit::emulation::new_history(bytes) : nullptr;
  memory.mapped.push_back({begin, begin + bytes, writable, false, name, history});
}

void ldmkit_emulation_unmap(const void* pointer) {
  const std::lock_guard<std::mutex> guard(memory.mutex);
  const auto gone = [&](const ldmkit::emulation::Region& region) {
    const bool here = pointer == nullptr || region.begin == ldmkit::emulation::address_of(pointer);
    if (here) std::free(region.history);
    return here;
  };
  memory.mapped.erase(std::remove_if(memory.mapped.begin(), memory.mapped.end(), gone), memory.mapped.end());
}
