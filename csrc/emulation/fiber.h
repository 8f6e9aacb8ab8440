// A stack of its own and a place to go on from.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ldmkit::emulation {

class Fiber {
 public:
  // The launching thread, which has a stack already.
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Gives it a stack, on which entry() runs when it is first switched to; entry must not return.
  void start(void (*entry)());
  bool started() const { return context_ != nullptr; }
  // Forgets where it stood, so that it can be started again.
  void abandon();

  // Leaves `this`, which is running, for `to`; returns when somebody switches back.
  void switch_to(Fiber& to);

  bool on_stack(uintptr_t address) const { return address - reinterpret_cast<uintptr_t>(stack_) < kStackBytes; }

 private:
  static constexpr size_t kStackBytes = 256 * 1024;  // reserved; only touched pages are memory
  void* context_ = nullptr;
  char* stack_ = nullptr;
};

}  // namespace ldmkit::emulation
