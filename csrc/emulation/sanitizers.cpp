// What the compiler calls from kernels built with -fsanitize=thread (before each access to memory) and -fsanitize=undefined:
// the checks are memory.cpp's and this file's, not those of the compiler's libraries. A finding ends the launch, not the
// process, so that it reaches Python as an exception and a property test can look for a smaller example.
#include "machine.h"
#include "memory.h"

using ldmkit::emulation::check_access;
using ldmkit::emulation::fail;
using ldmkit::emulation::Place;

#define LDMKIT_ACCESS(bytes)                                                                                        \
  extern "C" void __tsan_read##bytes(const void* at) { check_access(at, bytes, false, LDMKIT_CALLER); }             \
  extern "C" void __tsan_write##bytes(const void* at) { check_access(at, bytes, true, LDMKIT_CALLER); }             \
  extern "C" void __tsan_unaligned_read##bytes(const void* at) { check_access(at, bytes, false, LDMKIT_CALLER); }   \
  extern "C" void __tsan_unaligned_write##bytes(const void* at) { check_access(at, bytes, true, LDMKIT_CALLER); }
LDMKIT_ACCESS(1)
LDMKIT_ACCESS(2)
LDMKIT_ACCESS(4)
LDMKIT_ACCESS(8)
LDMKIT_ACCESS(16)
extern "C" void __tsan_read_range(const void* at, size_t bytes) { check_access(at, bytes, false, LDMKIT_CALLER); }
extern "C" void __tsan_write_range(const void* at, size_t bytes) { check_access(at, bytes, true, LDMKIT_CALLER); }
extern "C" void __tsan_init() {}

// Atomics of launchers, and of the flags that guard static variables: done, and no more.
#define LDMKIT_HOST_ATOMIC(bits, T)                                                                                  \
  extern "C" T __tsan_atomic##bits##_load(const volatile T* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); } \
  extern "C" void __tsan_atomic##bits##_store(volatile T* at, T value, int) { __atomic_store_n(at, value, __ATOMIC_SEQ_CST); }
LDMKIT_HOST_ATOMIC(8, uint8_t)
LDMKIT_HOST_ATOMIC(32, uint32_t)
LDMKIT_HOST_ATOMIC(64, uint64_t)

namespace {

// How the compiler describes a finding: each kind's data begin with the place. (GCC's ubsan.cc, LLVM's ubsan_handlers.h.)
struct Finding {
  const char* file;
  uint32_t line, column;
};

struct TypeMismatch {
  Finding finding;
  const void* type;
  unsigned char log_alignment, kind;
};

[[noreturn]] void undefined(const Finding* finding, const char* what) {
  fail({finding->file, static_cast<int>(finding->line), 0}, "undefined behaviour: %s", what);
}

}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, uintptr_t pointer) {
  const Place place = {data->finding.file, static_cast<int>(data->finding.line), 0};
  if (pointer == 0) fail(place, "undefined behaviour: access through a null pointer");
  fail(place, "undefined behaviour: access to an address that is not aligned to %u bytes", 1u << data->log_alignment);
}

#define LDMKIT_UNDEFINED(name, what) \
  extern "C" void __ubsan_handle_##name(const Finding* finding) { undefined(finding, what); }
LDMKIT_UNDEFINED(out_of_bounds, "index outside an array")
LDMKIT_UNDEFINED(shift_out_of_bounds, "shift by too many bits, or of a negative number")
LDMKIT_UNDEFINED(add_overflow, "a signed sum overflows")
LDMKIT_UNDEFINED(sub_overflow, "a signed difference overflows")
LDMKIT_UNDEFINED(mul_overflow, "a signed product overflows")
LDMKIT_UNDEFINED(negate_overflow, "a signed negation overflows")
LDMKIT_UNDEFINED(divrem_overflow, "an integer division by zero, or an overflow")
LDMKIT_UNDEFINED(builtin_unreachable, "an unreachable place was reached")
LDMKIT_UNDEFINED(missing_return, "the end of a function that returns a value was reached")
