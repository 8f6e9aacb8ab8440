#include "group_norm_silu_loops.h"

#include "group_norm_silu_vectors.h"
#include "instruction_set.h"

namespace ldmkit::group_norm {
namespace {

#define LDMKIT_LOOPS(NAME, TARGET, ISA)                                                                                        \
  template <class T>                                                                                                           \
  struct NAME {                                                                                                                \
    TARGET static void plane_moments(const Part<T>& part, const float* shift, float pivot, double* sum, double* square) {      \
      group_norm::plane_moments<ISA>(part, shift, pivot, sum, square);                                                         \
    }                                                                                                                          \
    TARGET static void row_moments(const Part<T>& part, const float* shift, const float* pivot, double* sum, double* square) { \
      group_norm::row_moments<ISA>(part, shift, pivot, sum, square);                                                           \
    }                                                                                                                          \
    TARGET static void plane_normalise(const Part<T>& part, const Coefficients& k, T* y, bool silu, bool stream) {             \
      group_norm::plane_normalise<ISA>(part, k, y, silu, stream);                                                              \
    }                                                                                                                          \
    TARGET static void row_normalise(const Part<T>& part, const Coefficients& k, T* y, bool silu, bool stream) {               \
      group_norm::row_normalise<ISA>(part, k, y, silu, stream);                                                                \
    }                                                                                                                          \
    TARGET static void plane_sums(const Part<T>& part, const T* grad, const Coefficients& k, bool silu, const Sums& to,        \
                                  float* kept) {                                                                               \
      group_norm::plane_sums<ISA>(part, grad, k, silu, to, kept);                                                              \
    }                                                                                                                          \
    TARGET static void row_sums(const Part<T>& part, const T* grad, const Coefficients& k, bool silu, const Sums& to,          \
                                float* kept) {                                                                                 \
      group_norm::row_sums<ISA>(part, grad, k, silu, to, kept);                                                                \
    }                                                                                                                          \
    TARGET static void plane_gradient(const Part<T>& part, const T* grad, const float* kept, const Coefficients& k, T* to,     \
                                      bool silu, bool stream) {                                                                \
      group_norm::plane_gradient<ISA>(part, grad, kept, k, to, silu, stream);                                                  \
    }                                                                                                                          \
    TARGET static void row_gradient(const Part<T>& part, const T* grad, const float* kept, const Coefficients& k, T* to,       \
                                    bool silu, bool stream) {                                                                  \
      group_norm::row_gradient<ISA>(part, grad, kept, k, to, silu, stream);                                                    \
    }                                                                                                                          \
  };

LDMKIT_LOOPS(Default, , Baseline)
#if defined(__x86_64__)
LDMKIT_LOOPS(WithAvx2, LDMKIT_TARGET_AVX2, Avx2)
LDMKIT_LOOPS(WithAvx512, LDMKIT_TARGET_AVX512, Avx512)
LDMKIT_LOOPS(WithAvx512Bf16, LDMKIT_TARGET_AVX512_BF16, Avx512Bf16)
#endif

// Reads with one instruction set and writes with another.
template <class T, template <class> class Reads, template <class> class Writes>
constexpr Loops<T> table() {
  return {Reads<T>::plane_moments, Reads<T>::row_moments, Writes<T>::plane_normalise, Writes<T>::row_normalise,
          Reads<T>::plane_sums,    Reads<T>::row_sums,    Writes<T>::plane_gradient,  Writes<T>::row_gradient};
}

}  // namespace

template <class T>
const Loops<T>& loops([[maybe_unused]] bool flush) {
#if defined(__x86_64__)
  static constexpr Loops<T> avx2 = table<T, WithAvx2, WithAvx2>(), avx512 = table<T, WithAvx512, WithAvx512>();
  switch (instruction_set()) {
    case InstructionSet::avx512_bf16:
      if constexpr (std::is_same_v<T, BFloat16>) {
        static constexpr Loops<T> flushing = table<T, WithAvx512, WithAvx512Bf16>();
        if (flush) return flushing;
      }
      return avx512;
    case InstructionSet::avx512: return avx512;
    case InstructionSet::avx2: return avx2;
    case InstructionSet::baseline: break;
  }
#endif
  static constexpr Loops<T> baseline = table<T, Default, Default>();
  return baseline;
}

template const Loops<float>& loops(bool);
template const Loops<Half>& loops(bool);
template const Loops<BFloat16>& loops(bool);

}  // namespace ldmkit::group_norm
