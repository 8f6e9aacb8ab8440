// Softmax of scores in registers: score[m][n][i] of a thread belongs to query row 16 m + g (i = 0, 1) or 16 m + g + 8 (i = 2,
// 3) of its warp's tile, and to key 8 n + 2 t + i % 2.
#pragma once

#include "cross_attention_fragments.cuh"

namespace ldmkit::attention {

constexpr float kLog2E = 1.4426950408889634f;

// How scores are read: as they come from the product, or scaled and with a mask's bias.
struct Reading {
  bool scaled_first;
  float scale,
      exponent;  // a score times `scale`, where that comes later; differences of scores times `exponent` are powers of 2

  template <class T>
  __device__ explicit Reading(const Call<T>& call)
      : scaled_first(call.scaled_first()), scale(scaled_first ? 1.0f : call.scale), exponent(scale * kLog2E) {}
};

// Scales and masks one score.
template <class T>
__device__ inline float read_score(const Call<T>& call, const Head<T>& head, float score, int query, int key) {
  return query < call.queries && key < call.keys ? masked(score * call.scale, head.bias(query, key)) : -INFINITY;
}

// Scores of all keys from `first_key` on for the queries from `first_query` on: masked, and -inf past the last key.
template <class T, int M, int N>
__device__ void read_scores(float (&score)[M][N][4], const Call<T>& call, const Head<T>& head, int first_query, int first_key) {
  const int g = lane() / 4, t = lane() % 4;
  if (call.scaled_first()) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int query = first_query + 16 * m + g + i / 2 * 8, key = first_key + 8 * n + 2 * t + i % 2;
          score[m][n][i] = read_score(call, head, score[m][n][i], query, key);
        }
      }
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if (first_key + 8 * n + 8 <= call.keys) continue;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first_key + 8 * n + 2 * t + i % 2 >= call.keys) score[m][n][i] = -INFINITY;
      }
    }
  }
}

// The greatest score of row half r of tile m among those a thread has and its quad.
template <int M, int N>
__device__ float row_max(const float (&score)[M][N][4], int m, int r) {
  float top = -INFINITY;
#pragma unroll
  for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(score[m][n][2 * r], score[m][n][2 * r + 1]));
  return quad_max(top);
}

// Scores of row half r of tile m become exp(score - top); returns the sum of those a thread has.
template <int M, int N>
__device__ float exponentiate(float (&score)[M][N][4], int m, int r, float top, float exponent) {
  const float reference = top == -INFINITY ? 0.0f : top;  // a row without keys so far
  float total = 0.0f;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 2 * r; i < 2 * r + 2; ++i) {
      score[m][n][i] = fast_exp2((score[m][n][i] - reference) * exponent);
      total += score[m][n][i];
    }
  }
  return total;
}

// out[m] += probabilities times values, whose rows are PITCH apart in shared memory; `used` keys, the rest are zeros.
template <class T, int PITCH, int M, int N, int TILES>
__device__ void add_values(float (&out)[M][TILES][4], const float (&probability)[M][N][4], const T* values, int used) {
#pragma unroll
  for (int j = 0; j < N / 2; ++j) {
    if (16 * j < used) {
      uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) as_left<T>(a[m], probability[m][2 * j], probability[m][2 * j + 1]);
      multiply_columns<T, PITCH>(out, a, values + 16 * j * PITCH);
    }
  }
}

// Where a head is wide, the SLICES warps of a group share its columns: each takes products over its own, and their sums are all
// warps' in the end, added in the order of slices. Written by every warp, then, after a barrier, read by all.
template <int PITCH, int N>
__device__ void put_slice(const float (&score)[N][4], float* exchange, int slice) {
  float* upper = exchange + (16 * slice + lane() / 4) * PITCH + lane() % 4 * 2;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    *reinterpret_cast<float2*>(upper + 8 * n) = make_float2(score[n][0], score[n][1]);
    *reinterpret_cast<float2*>(upper + 8 * PITCH + 8 * n) = make_float2(score[n][2], score[n][3]);
  }
}
template <int SLICES, int PITCH, int N>
__device__ void add_slices(float (&score)[N][4], const float* exchange) {
  const float* upper = exchange + lane() / 4 * PITCH + lane() % 4 * 2;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float2 u = make_float2(0.0f, 0.0f), l = u;
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice) {
      const float* from = upper + 16 * slice * PITCH + 8 * n;
      const float2 x = *reinterpret_cast<const float2*>(from), y = *reinterpret_cast<const float2*>(from + 8 * PITCH);
      u.x += x.x, u.y += x.y, l.x += y.x, l.y += y.y;
    }
    score[n][0] = u.x, score[n][1] = u.y, score[n][2] = l.x, score[n][3] = l.y;
  }
}

// Writes a warp's 16 M rows: out (B, L, H, D) from `column` on, and lse from the first slice of columns.
template <class T, int M, int TILES>
__device__ void store_output(const Call<T>& call, const Head<T>& head, const Reading& reading, T* out, float* lse,
                             int first_query, int column, const float (&d)[M][TILES][4], const float (&top)[M][2],
                             const float (&total)[M][2]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int upper = first_query + 16 * m + lane() / 4, lower = upper + 8;
    // A row without keys has total 0 and gives 0; NaN stays NaN.
    const float factor[2] = {total[m][0] == 0.0f ? 0.0f : 1.0f / total[m][0], total[m][1] == 0.0f ? 0.0f : 1.0f / total[m][1]};
    const int64_t stride = int64_t(call.heads) * call.width;
    T* rows = out + int64_t(head.b) * call.queries * stride + head.h * call.width + column;
    store_tile(rows + upper * stride, rows + lower * stride, upper < call.queries, lower < call.queries, call.width - column,
               d[m], factor);
    if (column == 0 && lane() % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = r == 0 ? upper : lower;
        if (query < call.queries) {
          lse[int64_t(head.index) * call.queries + query] =
              total[m][r] == 0.0f ? -INFINITY : top[m][r] * reading.scale + logf(total[m][r]);
        }
      }
    }
  }
}

}  // namespace ldmkit::attention
