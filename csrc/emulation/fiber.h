// A stack of its own and a place to go on from.
#pragma once

#include <cstddef>

namespace ldmkit::emulation {

class Fiber {
 public:
  // The thread of the host that launches: it has a stack already.
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Gives it a stack on which entry() runs when it is first switched to. entry must not return.
  void start(void (*entry)());
  // Forgets where it stood, so that it can be started again.
  void abandon();
  bool started() const { return context_ != nullptr; }

  // Leaves `this`, which is running, for `to`; returns when somebody switches back.
  void switch_to(Fiber& to);
  // The first thing on a new stack: tells AddressSanitizer that the switch is over.
  static void arrived(Fiber& launcher);

 private:
  void* context_ = nullptr;
  char* stack_ = nullptr;
  void* fake_stack_ = nullptr;       // AddressSanitizer's
  const void* bottom_ = nullptr;
  size_t size_ = 0;
};

}  // namespace ldmkit::emulation
