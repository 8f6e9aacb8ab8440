// Attention forward on tensor cores, in fp16 and bf16 with sums in fp32. Few keys: all of them stay in shared memory while
// queries stream past, and softmax takes one pass. Many keys: online softmax (Dao 2023, arXiv:2307.08691), tiles of keys stream
// past queries.
#pragma once

#include "cross_attention_softmax.cuh"

namespace ldmkit::attention {

constexpr int kFewWarps = 4;

// Blocks that a processor should hold at once, which registers must allow.
template <int D, int KEYS>
constexpr int kFewBlocks = KEYS > 80 || D > 80 ? 1
                           : D < 64            ? 2
                                               : 3;

template <class T, int D, int KEYS>
constexpr int few_keys_shared() {
  return static_cast<int>(sizeof(T)) * KEYS * (Columns<D>::kPiecesPitch + Columns<D>::kMatrixPitchUncontracted);
}

// A block serves one of `parts` runs of queries of a head, each warp 16 at a time. Grid: B H parts.
template <class T, int D, int KEYS>
__global__ void __launch_bounds__(32 * kFewWarps, kFewBlocks<D, KEYS>)
    few_keys_forward(Call<T> call, T* out, float* lse, int parts) {
  constexpr int N = KEYS / 8, kThreads = 32 * kFewWarps;
  constexpr int kKeyPitch = Columns<D>::kPiecesPitch, kValuePitch = Columns<D>::kMatrixPitchUncontracted;
  DYNAMIC_SHARED(memory);
  T* keys = reinterpret_cast<T*>(memory);
  T* values = keys + KEYS * kKeyPitch;

  const int index = static_cast<int>(blockIdx.x / static_cast<unsigned>(parts));
  const int part = static_cast<int>(blockIdx.x % static_cast<unsigned>(parts));
  const Head<T> head(call, index);
  const Reading reading(call);
  const auto readable = [&](int key) { return head.readable(key); };
  const int rows = (call.keys + 15) / 16 * 16;
  copy_rows<T, Columns<D>::kContracted, kKeyPitch, kThreads>(keys, head.k, call.k.stride, 0, rows, call.keys, call.D, readable);
  copy_rows<T, D, kValuePitch, kThreads>(values, head.v, call.v.stride, 0, rows, call.keys, call.D, readable);
  cp_async_commit();

  const int64_t tiles = (int64_t(call.queries) + 15) / 16;
  const int end = static_cast<int>(tiles * (part + 1) / parts);
  int tile = static_cast<int>(tiles * part / parts) + static_cast<int>(threadIdx.x) / 32;
  LeftTile<T, D> q[1];
  q[0].template load<Order::pieces>(head.q, call.q.stride, 16 * tile, tile < end ? call.queries : 0, call.D);
  cp_async_wait<0>();
  __syncthreads();

  for (; tile < end; tile += kFewWarps) {
    const int first_query = 16 * tile;
    float score[1][N][4];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float d[1][4] = {};
      if (8 * n < call.keys) multiply_rows<Order::pieces, T, D, kKeyPitch>(d, q, keys + 8 * n * kKeyPitch);
#pragma unroll
      for (int i = 0; i < 4; ++i) score[0][n][i] = d[0][i];
    }
    // The next queries are on their way while these are worked on.
    const int next = tile + kFewWarps;
    q[0].template load<Order::pieces>(head.q, call.q.stride, 16 * next, next < end ? call.queries : 0, call.D);

    read_scores(score, call, head, first_query, 0);
    float top[1][2], total[1][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[0][r] = row_max(score, 0, r);
      total[0][r] = quad_sum(exponentiate(score, 0, r, top[0][r], reading.exponent));
    }
    float d[1][D / 8][4] = {};
    add_values<T, kValuePitch>(d, score, values, call.keys);
    store_output(call, head, reading, out, lse, first_query, 0, d, top, total);
  }
}

// How a block serves many keys: WARPS warps in groups of SLICES, a group for 16 M queries, each of its warps for a slice of D.
template <class T, int D, int KEYS, int M, int WARPS, int SLICES>
struct ManyKeys {
  static constexpr int kThreads = 32 * WARPS, kGroups = WARPS / SLICES, kQueries = 16 * M * kGroups;
  static constexpr int kKeyPitch = Columns<D>::kPiecesPitch, kValuePitch = Columns<D>::kMatrixPitchUncontracted;
  static constexpr int kStage = KEYS * (kKeyPitch + kValuePitch);  // elements
  static constexpr int kExchangePitch = KEYS + 8;                  // floats
  static constexpr int kExchange = SLICES > 1 ? WARPS * 16 * kExchangePitch : 0;
  static constexpr int kShared = 2 * kStage * static_cast<int>(sizeof(T)) + kExchange * static_cast<int>(sizeof(float));
  static_assert(SLICES == 1 || (M == 1 && D % (16 * SLICES) == 0), "a slice has whole steps of a product; 16 queries share it");
};

// A block serves kQueries queries of a head. Grid: B H ceil(L / kQueries).
template <class T, int D, int KEYS, int M, int WARPS, int SLICES>
__global__ void __launch_bounds__(32 * WARPS, 1) many_keys_forward(Call<T> call, T* out, float* lse) {
  using Shape = ManyKeys<T, D, KEYS, M, WARPS, SLICES>;
  constexpr int N = KEYS / 8, kOwn = D / SLICES;  // columns of a warp
  DYNAMIC_SHARED(memory);
  T* stages = reinterpret_cast<T*>(memory);
  float* exchange = reinterpret_cast<float*>(stages + 2 * Shape::kStage);

  const unsigned blocks = (static_cast<unsigned>(call.queries) + Shape::kQueries - 1) / Shape::kQueries;
  const Head<T> head(call, static_cast<int>(blockIdx.x / blocks));
  const Reading reading(call);
  const int warp = static_cast<int>(threadIdx.x) / 32, group = warp / SLICES, slice = warp % SLICES, column = kOwn * slice;
  const int first_query = static_cast<int>(blockIdx.x % blocks) * Shape::kQueries + 16 * M * group;
  const auto readable = [&](int key) { return head.readable(key); };
  const auto copy = [&](int first_key) {
    T* keys = stages + first_key / KEYS % 2 * Shape::kStage;
    T* values = keys + KEYS * Shape::kKeyPitch;
    copy_rows<T, Columns<D>::kContracted, Shape::kKeyPitch, Shape::kThreads>(keys, head.k, call.k.stride, first_key, KEYS,
                                                                             call.keys, call.D, readable);
    copy_rows<T, D, Shape::kValuePitch, Shape::kThreads>(values, head.v, call.v.stride, first_key, KEYS, call.keys, call.D,
                                                         readable);
    cp_async_commit();
  };

  copy(0);
  LeftTile<T, kOwn> q[M];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    q[m].template load<Order::pieces>(head.q + column, call.q.stride, first_query + 16 * m, call.queries, call.D - column);
  }
  float d[M][kOwn / 8][4] = {}, top[M][2], total[M][2] = {};
#pragma unroll
  for (int m = 0; m < M; ++m) top[m][0] = top[m][1] = -INFINITY;

  for (int first_key = 0; first_key < call.keys; first_key += KEYS) {
    cp_async_wait<0>();
    __syncthreads();  // these keys are there for all, and all are done with those before, which the next replace
    if (first_key + KEYS < call.keys) copy(first_key + KEYS);
    const T* keys = stages + first_key / KEYS % 2 * Shape::kStage;

    float score[M][N][4];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float s[M][4] = {};
      multiply_rows<Order::pieces, T, kOwn, Shape::kKeyPitch>(s, q, keys + 8 * n * Shape::kKeyPitch + column);
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[m][n][i] = s[m][i];
      }
    }
    if constexpr (SLICES > 1) {
      float* of_group = exchange + group * SLICES * 16 * Shape::kExchangePitch;
      put_slice<Shape::kExchangePitch>(score[0], of_group, slice);
      __syncthreads();
      add_slices<SLICES, Shape::kExchangePitch>(score[0], of_group);
    }
    read_scores(score, call, head, first_query, first_key);

#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float higher = fmaxf(top[m][r], row_max(score, m, r));
        const float shrink = higher == -INFINITY ? 1.0f : fast_exp2((top[m][r] - higher) * reading.exponent);
        total[m][r] = total[m][r] * shrink + exponentiate(score, m, r, higher, reading.exponent);
        top[m][r] = higher;
#pragma unroll
        for (int n = 0; n < kOwn / 8; ++n) d[m][n][2 * r] *= shrink, d[m][n][2 * r + 1] *= shrink;
      }
    }
    add_values<T, Shape::kValuePitch>(d, score, keys + KEYS * Shape::kKeyPitch + column, call.keys - first_key);
  }
#pragma unroll
  for (int m = 0; m < M; ++m) total[m][0] = quad_sum(total[m][0]), total[m][1] = quad_sum(total[m][1]);
  store_output(call, head, reading, out, lse, first_query, column, d, top, total);
}

}  // namespace ldmkit::attention
