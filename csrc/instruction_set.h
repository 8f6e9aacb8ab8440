// Which instructions the C++ kernels use: chosen once, at run time, so that one build serves every processor.
#pragma once

#include <cstdlib>
#include <cstring>

namespace ldmkit {

// What each name promises is the target attribute that kernels are compiled with for it.
#define LDMKIT_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define LDMKIT_TARGET_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define LDMKIT_TARGET_AVX512_BF16 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

enum class InstructionSet { baseline, avx2, avx512, avx512_bf16 };

inline const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::avx2: return "avx2";
    case InstructionSet::avx512: return "avx512";
    case InstructionSet::avx512_bf16: return "avx512_bf16";
    case InstructionSet::baseline: break;
  }
  return "default";
}

// The widest that this processor has and ATEN_CPU_CAPABILITY (torch's own switch) allows: "default", "avx2" or "avx512", as
// torch has them, or "avx512_bf16"; unset is the widest.
inline InstructionSet detect_instruction_set() {
#if defined(__x86_64__)
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const auto wished = [&](const char* name) { return wish && std::strcmp(wish, name) == 0; };
  const bool allows_avx512 = !wish || wished("avx512") || wished("avx512_bf16"), allows_avx2 = !wished("default");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (allows_avx512 && has_avx512) {
    return __builtin_cpu_supports("avx512bf16") && !wished("avx512") ? InstructionSet::avx512_bf16 : InstructionSet::avx512;
  }
  if (allows_avx2 && has_avx2) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

inline InstructionSet instruction_set() {
  static const InstructionSet detected = detect_instruction_set();
  return detected;
}

}  // namespace ldmkit
