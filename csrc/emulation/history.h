// What was done to each piece of memory, so that a sanitized build can tell a race.
#pragma once

#include <string>

#include "runtime.h"

namespace ldmkit::emulation {

// One access to two bytes: no kernel of ours splits a 16-bit element between threads. Zeros are none.
struct Access {
  uint32_t time;
  uint32_t pc;      // from the library's beginning
  uint16_t thread;  // its rank, plus 1
};

// The accesses of one block that later ones may race with. Of many readers two will do: a writer is another thread than one of
// them.
struct History {
  uint32_t block;
  bool reserved;
  Access write, reads[2];
};

// Null in a build that is not sanitized.
History* new_history(size_t bytes);

// Memory that a kernel may touch.
struct Region {
  uintptr_t begin, end;
  bool writable;
  bool shared;  // between the threads of a block, not between blocks
  std::string name;
  History* history;  // null: is not recorded
};

// Notes an access by the current thread to the two bytes at `at`; ends the launch if it races with an earlier one.
void record(const Region& region, uintptr_t at, bool writes, History& history, const Place& place);

// Blocks are ordered only as in the programming guide's "Memory fence functions": writes, __threadfence, atomic; atomic, reads.
void order_for_launch();
void order_for_block();
void order_by_atomic();

}  // namespace ldmkit::emulation
