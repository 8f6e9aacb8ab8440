// Rows of scores => weights of the next product, with what a later block of keys, or the end, must know of them.
#pragma once

#include <limits>

#include "cross_attention_tile.h"

namespace ldmkit::attention {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <int W>
LDMKIT_INLINE Floats<W> greater(Floats<W> a, Floats<W> b) {
  return (a > b) ? a : b;
}

template <int W>
LDMKIT_INLINE float sum_of(Floats<W> x) {
  if constexpr (W == 4) {
    return (x[0] + x[2]) + (x[1] + x[3]);
  } else {
    Floats<W / 2> half[2];
    std::memcpy(half, &x, sizeof(x));
    return sum_of<W / 2>(half[0] + half[1]);
  }
}

template <int W>
LDMKIT_INLINE float greatest_of(Floats<W> x) {
  if constexpr (W == 4) {
    const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
  } else {
    Floats<W / 2> half[2];
    std::memcpy(half, &x, sizeof(x));
    return greatest_of<W / 2>(greater<W / 2>(half[0], half[1]));
  }
}

// exp(t) for t <= 0, 0 below -87; NaN stays NaN. exp(t) = 2^k 2^r, k = round(t log2(e)), and 2^r by a polynomial that is
// minimax in relative error over [-1/2, 1/2] and exact at 0: 2.0e-9, or 9.1e-8 for weights that are rounded to bf16.
template <int W, class Operand>
LDMKIT_INLINE Floats<W> exp_of(Floats<W> t) {
  using F = Floats<W>;
  constexpr float kLog2e = 1.44269504088896341f;
  const F rounder = F{} + (12582912.0f + 127.0f);  // 1.5 * 2^23: adding it rounds to an integer; 127 is the exponent's bias
  const F shifted = t * kLog2e + rounder;
  const F r = t * kLog2e - (shifted - rounder);
  F p;
  if constexpr (Operand::kDepth == 2) {
    p = F{} + 0.001326472731307149f;
    p = p * r + 0.009671512991189957f;
    p = p * r + 0.05550733581185341f;
    p = p * r + 0.24022242426872253f;
    p = p * r + 0.6931470036506653f;
  } else {
    p = F{} + 0.00015353361959569156f;
    p = p * r + 0.0013398873852565885f;
    p = p * r + 0.00961843691766262f;
    p = p * r + 0.055503323674201965f;
    p = p * r + 0.24022647738456726f;
    p = p * r + 0.6931471824645996f;
  }
  p = p * r + 1.0f;
  const F power = bit_cast<F>(bit_cast<Bits<W>>(shifted) << 23);
  return (t < -87.0f) ? F{} : p * power;
}

// Two vectors of fp32 => one of bf16, in order, rounded to nearest even.
template <int W>
LDMKIT_INLINE Floats<W> to_pairs(Floats<W> low, Floats<W> high) {
  static_assert(kAvx<W>);
  Floats<W> pairs;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(pairs) : "v"(low), "v"(high));
  return pairs;
}

// What is known of rows so far: the greatest score, the sum of exp(score - top), and the same of the weights as the operand has
// them. Outputs are divided by the latter, so that rounding the weights changes no row's sum of them.
struct RowSums {
  float *top, *total, *weight;
};

// Scores => weights exp(score - top) in the operand's format, in place, for kTogether rows. A bias is added to the scores
// first; -inf hides a key whatever its score. `decay` is what sums over earlier keys must be multiplied by.
template <class M>
LDMKIT_INLINE void softmax(float* scores, int64_t stride, const float* bias, int64_t bias_stride, int64_t keys, bool first,
                           const RowSums& sums, float* decay) {
  constexpr int W = M::W, G = M::kTogether;
  using F = Floats<W>;
  using Operand = typename M::Operand;
  const int64_t vectors = ceil_div(keys, W);
  const F hidden = F{} - kInfinity;
  if (bias != nullptr) {
    for (int g = 0; g < G; ++g) {
      for (int64_t j = 0; j < vectors; ++j) {
        const F b = load<W>(bias + g * bias_stride + j * W);
        float* to = scores + g * stride + j * W;
        store<W>(to, (b == hidden) ? hidden : load<W>(to) + b);
      }
    }
  }
  if (keys % W != 0) {
    static constexpr float kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const F lanes = load<W>(kLanes), end = splat<W>(float(keys % W));
    for (int g = 0; g < G; ++g) {
      float* last = scores + g * stride + (vectors - 1) * W;
      store<W>(last, (lanes < end) ? load<W>(last) : hidden);
    }
  }

  F shift[G];
  float before[G];
  {
    F top[G];
    for (int g = 0; g < G; ++g) top[g] = hidden;
    for (int64_t j = 0; j < vectors; ++j) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) top[g] = greater<W>(load<W>(scores + g * stride + j * W), top[g]);
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      before[g] = first ? -kInfinity : sums.top[g];
      const float here = greatest_of<W>(top[g]), after = here > before[g] ? here : before[g];
      sums.top[g] = after;
      shift[g] = splat<W>(after == -kInfinity ? 0.0f : after);  // without any key so far, all weights are exp(-inf) = 0
    }
  }

  F total[G] = {}, weight[G] = {};
  if constexpr (Operand::kDepth == 1) {
    for (int64_t j = 0; j < vectors; ++j) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        float* at = scores + g * stride + j * W;
        const F p = exp_of<W, Operand>(load<W>(at) - shift[g]);
        total[g] += p;
        store<W>(at, p);
      }
    }
  } else {
    const F ones = bit_cast<F>(Bits<W>{} + 0x3f803f80u);
    for (int64_t j = 0; j < vectors; j += 2) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const float* from = scores + g * stride + j * W;
        const F p = exp_of<W, Operand>(load<W>(from) - shift[g]);
        const F next = j + 1 < vectors ? exp_of<W, Operand>(load<W>(from + W) - shift[g]) : F{};
        const F pairs = to_pairs<W>(p, next);
        total[g] += p + next;
        weight[g] = Operand::template add_product<W>(weight[g], pairs, ones);
        store<W>(scores + g * stride + j * (W / 2), pairs);
      }
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
    const float sum = sum_of<W>(total[g]), kept = Operand::kDepth == 1 ? sum : sum_of<W>(weight[g]);
    decay[g] = first ? 0.0f : exp_of<W, Single>(splat<W>(before[g]) - shift[g])[0];
    sums.total[g] = first ? sum : sums.total[g] * decay[g] + sum;
    sums.weight[g] = first ? kept : sums.weight[g] * decay[g] + kept;
  }
}

// fp32 with the upper half rounded to nearest even, as bf16 has it. (NaN: what instructions make has an empty lower half.)
template <int W>
LDMKIT_INLINE Bits<W> rounded_bits(Floats<W> x) {
  const Bits<W> bits = bit_cast<Bits<W>>(x);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// Two vectors of fp32 => one of bf16, interleaved: a pair per lane.
template <int W>
LDMKIT_INLINE Floats<W> to_lane_pairs(Floats<W> low, Floats<W> high) {
  return bit_cast<Floats<W>>((rounded_bits<W>(low) >> 16) | (rounded_bits<W>(high) & 0xffff0000u));
}

// The scores and the products dP = dO V^T of kRows queries => P = exp(score - lse) and dS = P (dP - delta), as operands: dS by
// query, P and dS by key, where pairs hold two neighbouring queries. The bias is as in `softmax`.
template <class M>
LDMKIT_INLINE void softmax_backward(float* scores, float* dp, int64_t stride, const float* bias, int64_t bias_stride,
                                    int64_t keys, const float* lse, const float* delta, typename M::Element* ds_rows,
                                    typename M::Element* p_columns, typename M::Element* ds_columns) {
  constexpr int W = M::W, kDepth = M::Operand::kDepth;
  using F = Floats<W>;
  const int64_t padded = round_up(keys, W * kDepth);
  const F hidden = F{} - kInfinity;
  for (int i = 0; i < M::kRows; i += kDepth) {
    for (int r = i; r < i + kDepth; ++r) {  // keys past the last have weight 0, and dP 0 rather than what was there before
      for (int64_t s = keys; s < padded; ++s) scores[r * stride + s] = -kInfinity, dp[r * stride + s] = 0.0f;
    }
    for (int64_t j = 0; j < padded; j += W * kDepth) {
      F p[kDepth][kDepth], ds[kDepth][kDepth];
#pragma GCC unroll 2
      for (int r = 0; r < kDepth; ++r) {
        const F shift = splat<W>(lse[i + r]), less = splat<W>(delta[i + r]);
#pragma GCC unroll 2
        for (int c = 0; c < kDepth; ++c) {
          const int64_t at = (i + r) * stride + j + c * W;
          F x = load<W>(scores + at);
          if (bias != nullptr) {
            const F b = load<W>(bias + (i + r) * bias_stride + j + c * W);
            x = (x == hidden) ? x : (b == hidden) ? b : x + b;
          }
          F t = x - shift;
          t = (t > 0.0f) ? F{} : t;
          p[r][c] = exp_of<W, typename M::Operand>(t);
          if constexpr (kDepth ==
                        1) {  // what rounding took from t (Dekker 1971, fast two-sum), for lse is large where weights are small
            const F rest = x - (t + shift);
            p[r][c] += p[r][c] * ((t < -87.0f) ? F{} : rest);
          }
          ds[r][c] = p[r][c] * (load<W>(dp + at) - less);
        }
      }
      if constexpr (kDepth == 1) {
        store<W>(p_columns + i * stride + j, p[0][0]);
        store<W>(ds_rows + i * stride + j, ds[0][0]);
      } else {
        auto* rows = reinterpret_cast<float*>(ds_rows) + i * (stride / 2) + j / 2;
        store<W>(rows, to_pairs<W>(ds[0][0], ds[0][1]));
        store<W>(rows + stride / 2, to_pairs<W>(ds[1][0], ds[1][1]));
#pragma GCC unroll 2
        for (int c = 0; c < kDepth; ++c) {
          const int64_t at = i / 2 * stride + j + c * W;
          store<W>(reinterpret_cast<float*>(p_columns) + at, to_lane_pairs<W>(p[0][c], p[1][c]));
          store<W>(reinterpret_cast<float*>(ds_columns) + at, to_lane_pairs<W>(ds[0][c], ds[1][c]));
        }
      }
    }
  }
}

}  // namespace ldmkit::attention
