#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef LDMKIT_SANITIZED
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && !defined(LDMKIT_EMULATION_UCONTEXT)

// void ldmkit_fiber_switch(void** from, void* to): pushes what the ABI says a callee keeps, and swaps stacks.
asm(R"(
.text
.globl ldmkit_fiber_switch
.hidden ldmkit_fiber_switch
.type ldmkit_fiber_switch, @function
ldmkit_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ldmkit_fiber_switch, .-ldmkit_fiber_switch
)");
extern "C" void ldmkit_fiber_switch(void** from, void* to);

namespace {

void* make_context(char* stack, size_t size, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;  // entry's return address: the stack is 16-byte aligned at its call, as the ABI wants it
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}
void swap_context(void** from, void* to) { ldmkit_fiber_switch(from, to); }
void free_context(void*) {}

}  // namespace

#else

#include <ucontext.h>

namespace {

void* make_context(char* stack, size_t size, void (*entry)()) {
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = size;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
void swap_context(void** from, void* to) {
  if (*from == nullptr) *from = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}
void free_context(void* context) { delete static_cast<ucontext_t*>(context); }

}  // namespace

#endif

namespace ldmkit::emulation {
namespace {

constexpr size_t kStack = 256 * 1024;  // reserved; only touched pages are memory

}  // namespace

Fiber::~Fiber() {
  abandon();
  if (stack_ != nullptr) munmap(stack_, kStack);
}

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, 4096, PROT_NONE);  // running over the end must not go unseen
    stack_ = static_cast<char*>(memory);
    bottom_ = stack_ + 4096;
    size_ = kStack - 4096;
  }
  context_ = make_context(stack_, kStack, entry);
}

void Fiber::abandon() {
  free_context(context_);
  context_ = nullptr;
  fake_stack_ = nullptr;
#ifdef LDMKIT_SANITIZED
  if (stack_ != nullptr) __asan_unpoison_memory_region(bottom_, size_);
#endif
}

void Fiber::switch_to(Fiber& to) {
#ifdef LDMKIT_SANITIZED
  __sanitizer_start_switch_fiber(&fake_stack_, to.bottom_, to.size_);
#endif
  swap_context(&context_, to.context_);
#ifdef LDMKIT_SANITIZED
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::arrived([[maybe_unused]] Fiber& launcher) {
#ifdef LDMKIT_SANITIZED
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (launcher.bottom_ == nullptr) {
    launcher.bottom_ = bottom;
    launcher.size_ = size;
  }
#endif
}

}  // namespace ldmkit::emulation
