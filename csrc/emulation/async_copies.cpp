// cp.async at its latest: nothing is read or written before the wait that must come first.
#include "machine.h"
#include "memory.h"

namespace ldmkit::emulation {

void cp_async(void* shared, const void* global, size_t bytes, bool valid) {
  const Place place = LDMKIT_CALLER;
  check_shared(shared, bytes, "cp.async's destination", place);
  check_aligned(shared, bytes, "cp.async's destination", place);
  check_access(shared, bytes, true, place);
  if (valid) {
    check_aligned(global, bytes, "cp.async's source", place);
    check_access(global, bytes, false, place);
  }
  std::memset(shared, 0xff, bytes);
  reserve(shared, bytes, true);
  Thread& self = machine.self();
  self.copies.push_back(
      {self.groups, static_cast<unsigned char*>(shared), valid ? static_cast<const unsigned char*>(global) : nullptr, bytes});
}

void cp_async_commit() { ++machine.self().groups; }

void cp_async_wait(int groups_left) {
  const Place place = LDMKIT_CALLER;
  Thread& self = machine.self();
  size_t done = 0;
  for (; done < self.copies.size() && self.copies[done].group < self.groups - groups_left; ++done) {
    const Copy& copy = self.copies[done];
    reserve(copy.to, copy.bytes, false);
    check_access(copy.to, copy.bytes, true, place);
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, copy.bytes);
    } else {
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<ptrdiff_t>(done));
}

}  // namespace ldmkit::emulation
