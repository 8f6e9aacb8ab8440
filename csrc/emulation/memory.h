// Which memory a kernel may touch, and (in a sanitized build) what was done to each piece of it, so that races show.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime.h"

namespace ldmkit::emulation {

constexpr size_t kMostShared = 227 * 1024;  // dynamic shared memory of a block, on sm_90 and sm_100

#ifdef LDMKIT_SANITIZED
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

void memory_for_launch(const void* parameters, size_t parameter_bytes, size_t shared_bytes);
void memory_for_block();

// Ends the launch if the current thread may not read (write) these bytes, or if another did otherwise with nothing between to
// order the two. Does nothing in a build that is not sanitized.
void check_access(const void* at, size_t bytes, bool writes, const Place& place);

// Ends the launch if these bytes are not in the block's shared memory, or not aligned to their own number.
void check_shared(const void* at, size_t bytes, const char* what, const Place& place);
void check_aligned(const void* at, size_t bytes, const char* what, const Place& place);

// Until they are released nobody may touch these bytes: a cp.async is on its way to them.
void reserve(const void* at, size_t bytes, bool reserved);

}  // namespace ldmkit::emulation
