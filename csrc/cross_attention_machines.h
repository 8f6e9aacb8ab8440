// The machines by name, and the one that this processor is. Their inner loops are functions of their own: inlined, they would
// compete for registers with what surrounds them.
#pragma once

#include "cross_attention_softmax.h"
#include "cross_attention_tile.h"
#include "dtype.h"
#include "instruction_set.h"

namespace ldmkit::attention {
namespace {

#define LDMKIT_ATTENTION_MACHINE(NAME, TARGET, W, ROWS, VECTORS, TOGETHER, OPERAND)                                            \
  struct NAME : Machine<W, ROWS, VECTORS, TOGETHER, OPERAND> {                                                                 \
    template <int N, bool kTransposed>                                                                                         \
    TARGET __attribute__((noinline)) static void tile(const Element* a, int64_t a_stride, const Element* b, int64_t depth,     \
                                                      float factor, bool add, float* c, int64_t c_stride) {                    \
      attention::tile<NAME, N, kTransposed>(a, a_stride, b, depth, factor, add, c, c_stride);                                  \
    }                                                                                                                          \
    TARGET __attribute__((noinline)) static void softmax(float* scores, int64_t stride, const float* bias,                     \
                                                         int64_t bias_stride, int64_t keys, bool first, const RowSums& sums,   \
                                                         float* decay) {                                                       \
      attention::softmax<NAME>(scores, stride, bias, bias_stride, keys, first, sums, decay);                                   \
    }                                                                                                                          \
    TARGET __attribute__((noinline)) static void softmax_backward(float* scores, float* dp, int64_t stride, const float* bias, \
                                                                  int64_t bias_stride, int64_t keys, const float* lse,         \
                                                                  const float* delta, Element* ds_rows, Element* p_columns,    \
                                                                  Element* ds_columns) {                                       \
      attention::softmax_backward<NAME>(scores, dp, stride, bias, bias_stride, keys, lse, delta, ds_rows, p_columns,           \
                                        ds_columns);                                                                           \
    }                                                                                                                          \
  };

LDMKIT_ATTENTION_MACHINE(Baseline, , 4, 4, 2, 1, Single)
#if defined(__x86_64__)
LDMKIT_ATTENTION_MACHINE(Avx2, LDMKIT_TARGET_AVX2, 8, 4, 3, 1, Single)
LDMKIT_ATTENTION_MACHINE(Avx512, LDMKIT_TARGET_AVX512, 16, 6, 4, 3, Single)
LDMKIT_ATTENTION_MACHINE(Avx512Pairs, LDMKIT_TARGET_AVX512_BF16, 16, 6, 4, 3, Pair)
#endif

}  // namespace
}  // namespace ldmkit::attention
