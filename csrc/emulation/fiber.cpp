// Switching by hand on x86-64: swapcontext also swaps signal masks, by a system call. It is what other processors get.
#include "fiber.h"

#include <sys/mman.h>

#include <new>

#if defined(__x86_64__) && !defined(LDMKIT_EMULATION_UCONTEXT)

// void ldmkit_fiber_switch(void** from, void* to): pushes what a callee keeps by the ABI, and swaps stacks.
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

void* make_context(char* stack, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // where entry would return to: it leaves the stack aligned as the ABI has it at a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}
void swap_contexts(void** from, void* to) { ldmkit_fiber_switch(from, to); }
void free_context(void*) {}

}  // namespace

#else

#include <ucontext.h>

namespace {

void* make_context(char* stack, size_t bytes, void (*entry)()) {
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
void swap_contexts(void** from, void* to) {
  if (*from == nullptr) *from = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}
void free_context(void* context) { delete static_cast<ucontext_t*>(context); }

}  // namespace

#endif

namespace ldmkit::emulation {

Fiber::~Fiber() {
  abandon();
  if (stack_ != nullptr) munmap(stack_, kStackBytes);
}

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, 4096, PROT_NONE);  // a stack that overflows must not do so unseen
    stack_ = static_cast<char*>(memory);
  }
  context_ = make_context(stack_, kStackBytes, entry);
}

void Fiber::abandon() {
  free_context(context_);
  context_ = nullptr;
}

void Fiber::switch_to(Fiber& to) { swap_contexts(&context_, to.context_); }

}  // namespace ldmkit::emulation
