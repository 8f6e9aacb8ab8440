#include "memory.h"

#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <unordered_set>

#include "machine.h"

namespace ldmkit::emulation {
namespace {

// One access to two bytes: no kernel of ours splits a 16-bit element between threads. Zeros are none.
struct Access {
  uint32_t time;
  uint32_t pc;      // from the library's beginning
  uint16_t thread;  // its rank, plus 1
};

// The accesses of one block that later ones may race with. Two readers: any writer is another thread than one of them.
struct History {
  uint32_t block;
  bool reserved;
  Access write, reads[2];
};

struct Region {
  uintptr_t begin, end;
  bool writable;
  bool shared;  // between the threads of a block, not between blocks
  std::string name;
  History* history;  // null: is not recorded
};

History* new_history(size_t bytes) {
  return kSanitized ? static_cast<History*>(std::calloc(bytes / 2 + 1, sizeof(History))) : nullptr;
}

uintptr_t address_of(const void* at) { return reinterpret_cast<uintptr_t>(at); }

struct Memory {
  std::mutex mutex;             // of `mapped`, between launches
  std::vector<Region> mapped;   // tensors
  std::vector<Region> locals;   // parameters and shared memory
  size_t statics = 0;           // locals from here on are the block's static variables
  unsigned char* dynamic = static_cast<unsigned char*>(std::aligned_alloc(128, kMostShared + 256)) + 16;  // 16-byte aligned, no more
  History* dynamic_history = new_history(kMostShared);
  uint32_t first_block = 0;     // of this launch
  bool fenced = false, acquired = false;
  std::unordered_set<uint32_t> released;  // blocks whose writes an atomic made known
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

// Whether something between orders another thread's access before the current thread's next one.
bool ordered(const Access& access) {
  const int other = access.thread - 1;
  if (other == machine.current || machine.synced > access.time) return true;
  if (other / 32 != machine.current / 32) return false;
  return machine.warp().synced > access.time || machine.warp().pairs[lane_id()][other % 32] > access.time;
}

[[noreturn]] void race(const Region& region, uintptr_t at, bool writes, bool wrote, const std::string& who, uint32_t their_pc,
                       const Place& place) {
  fail(place, "race: it %s byte %zu of %s, which %s %s at %s, and nothing orders the two", writes ? "writes" : "reads",
       at - region.begin, region.name.c_str(), who.c_str(), wrote ? "wrote" : "read",
       text(Place{"", 0, memory.image_begin + their_pc}).c_str());
}

void check_thread(const Region& region, uintptr_t at, bool writes, bool wrote, const Access& access, const Place& place) {
  if (access.thread == 0 || ordered(access)) return;
  race(region, at, writes, wrote, "thread " + text(machine.threads[access.thread - 1u]->index), access.pc, place);
}

// Blocks are ordered only as in the programming guide's "Memory fence functions": writes, __threadfence, atomic; atomic, reads.
void check_block(const Region& region, uintptr_t at, bool writes, const History& history, const Place& place) {
  if (memory.acquired && memory.released.count(history.block) != 0) return;
  const Access& read = history.reads[0];
  if (history.write.thread != 0) race(region, at, writes, true, "another block", history.write.pc, place);
  if (writes && read.thread != 0) race(region, at, writes, false, "another block", read.pc, place);
}

void record(const Region& region, uintptr_t at, bool writes, History& history, const Place& place) {
  if (history.block != machine.block_serial) {
    if (!region.shared && history.block >= memory.first_block) check_block(region, at, writes, history, place);
    history = {machine.block_serial, false, {}, {}};
  }
  if (history.reserved)
    fail(place, "it %s byte %zu of %s, to which a cp.async is still under way", writes ? "writes" : "reads", at - region.begin,
         region.name.c_str());
  const Access mine = {machine.now, static_cast<uint32_t>(place.pc - memory.image_begin), static_cast<uint16_t>(machine.current + 1)};
  check_thread(region, at, writes, true, history.write, place);
  if (writes) {
    for (const Access& read : history.reads) check_thread(region, at, writes, false, read, place);
    history.write = mine;
    history.reads[0] = history.reads[1] = {};
  } else {
    history.reads[history.reads[0].thread != 0 && history.reads[0].thread != mine.thread] = mine;
  }
}

}  // namespace

void memory_for_launch(const void* parameters, size_t parameter_bytes, size_t shared_bytes) {
  memory.first_block = machine.block_serial + 1;
  memory.released.clear();
  memory.locals.clear();
  const uintptr_t begin = address_of(parameters), dynamic = address_of(memory.dynamic);
  memory.locals.push_back({dynamic, dynamic + shared_bytes, true, true, "dynamic shared memory", memory.dynamic_history});
  memory.locals.push_back({begin, begin + parameter_bytes, false, false, "the kernel's parameters", nullptr});
  memory.statics = memory.locals.size();
}

void memory_for_block(uint32_t) {
  memory.locals.resize(memory.statics);
  memory.fenced = memory.acquired = false;
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
  if (memory.fenced) memory.released.insert(machine.block_serial);
  memory.acquired = true;
  const Region* region = memory.find(address_of(at), bytes);
  if (kSanitized && (region == nullptr || !region->writable))
    fail(place, "out of bounds: an atomic operation on %zu bytes%s", bytes, describe(address_of(at), bytes).c_str());
}

void fence() { memory.fenced = true; }

uintptr_t image_begin() { return memory.image_begin; }

unsigned char* dynamic_shared() { return memory.dynamic; }

SharedVariable::SharedVariable(size_t bytes, const Place& place)
    : memory_(static_cast<unsigned char*>(std::malloc(bytes))), bytes_(bytes), place_(place), history_(new_history(bytes)) {}

void* SharedVariable::data() {
  if (block_ != machine.block_serial) {
    block_ = machine.block_serial;
    std::memset(memory_, 0xff, bytes_);
    const uintptr_t begin = address_of(memory_);
    memory.locals.push_back({begin, begin + bytes_, true, true, "the shared variable at " + text(place_), static_cast<History*>(history_)});
  }
  return memory_;
}

}  // namespace ldmkit::emulation

using ldmkit::emulation::memory;

void ldmkit_emulation_map(const void* pointer, size_t bytes, bool writable, const char* name) {
  const std::lock_guard<std::mutex> guard(memory.mutex);
  const uintptr_t begin = ldmkit::emulation::address_of(pointer);
  memory.mapped.push_back({begin, begin + bytes, writable, false, name, writable ? ldmkit::emulation::new_history(bytes) : nullptr});
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
