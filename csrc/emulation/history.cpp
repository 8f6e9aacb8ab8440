#include "history.h"

#include <cstdlib>
#include <unordered_set>

#include "machine.h"
#include "memory.h"

namespace ldmkit::emulation {
namespace {

struct BlockOrder {
  uint32_t first_block = 0;  // of this launch
  bool fenced = false, acquired = false;
  std::unordered_set<uint32_t> released;  // blocks whose writes a fence and an atomic made known
} order;

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
       text(Place{"", 0, image_begin() + their_pc}).c_str());
}

void check_thread(const Region& region, uintptr_t at, bool writes, bool wrote, const Access& access, const Place& place) {
  if (access.thread == 0 || ordered(access)) return;
  race(region, at, writes, wrote, "thread " + text(machine.threads[access.thread - 1u]->index), access.pc, place);
}

void check_block(const Region& region, uintptr_t at, bool writes, const History& history, const Place& place) {
  if (order.acquired && order.released.count(history.block) != 0) return;
  const Access& read = history.reads[0];
  if (history.write.thread != 0) race(region, at, writes, true, "another block", history.write.pc, place);
  if (writes && read.thread != 0) race(region, at, writes, false, "another block", read.pc, place);
}

}  // namespace

History* new_history(size_t bytes) {
  return kSanitized ? static_cast<History*>(std::calloc(bytes / 2 + 1, sizeof(History))) : nullptr;
}

void record(const Region& region, uintptr_t at, bool writes, History& history, const Place& place) {
  if (history.block != machine.block_serial) {
    if (!region.shared && history.block >= order.first_block) check_block(region, at, writes, history, place);
    history = {machine.block_serial, false, {}, {}};
  }
  if (history.reserved)
    fail(place, "it %s byte %zu of %s, to which a cp.async is still under way", writes ? "writes" : "reads", at - region.begin,
         region.name.c_str());
  const auto pc = static_cast<uint32_t>(place.pc - image_begin());
  const Access mine = {machine.now, pc, static_cast<uint16_t>(machine.current + 1)};
  check_thread(region, at, writes, true, history.write, place);
  if (writes) {
    for (const Access& read : history.reads) check_thread(region, at, writes, false, read, place);
    history.write = mine;
    history.reads[0] = history.reads[1] = {};
  } else {
    const Access& first = history.reads[0];
    const bool replaces_first = first.thread == 0 || first.thread == mine.thread || machine.synced > first.time;
    history.reads[replaces_first ? 0 : 1] = mine;
  }
}

void order_for_launch() {
  order.first_block = machine.block_serial + 1;
  order.released.clear();
}

void order_for_block() { order.fenced = order.acquired = false; }

void order_by_atomic() {
  if (order.fenced) order.released.insert(machine.block_serial);
  order.acquired = true;
}

void fence() { order.fenced = true; }

}  // namespace ldmkit::emulation
