// The gradient of attention on tensor cores (Dao et al. 2022, arXiv:2205.14135, appendix B.4), one kernel for queries and one
// for keys and values. With P = exp(scores - lse), dP = dOut V^T and delta = rowsum(dOut * Out) - dLse:
// dScores = P * (dP - delta), dQ = scale dScores K, dK = scale dScores^T Q, dV = P^T dOut. Every sum has one owner and one order.
#pragma once

#include "cross_attention_softmax.cuh"

namespace ldmkit::attention {

// A row's log-sum-exp as an exponent of 2; a row without keys has -inf, and gets probability 0 from +inf.
__device__ inline float exponent_of_lse(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2E; }

// exp(score - log-sum-exp), at most 1 also where scores are so large that rounding would say otherwise. NaN stays NaN.
__device__ inline float probability(float score, float exponent, float lse_exponent) {
  const float power = fmaf(score, exponent, -lse_exponent);
  return fast_exp2(power > 0.0f ? 0.0f : power);
}

template <class T>
__device__ inline float dot_pair(uint32_t a, uint32_t b) {
  const Pack<T, 2> x = *reinterpret_cast<const Pack<T, 2>*>(&a), y = *reinterpret_cast<const Pack<T, 2>*>(&b);
  return fmaf(widen(x.at[0]), widen(y.at[0]), widen(x.at[1]) * widen(y.at[1]));
}

template <class T, int D>
__device__ float dot_row(const RowWords<T, D>& a, const RowWords<T, D>& b) {
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < Columns<D>::kWhole; ++c) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += dot_pair<T>(a.whole[c].at[j], b.whole[c].at[j]);
  }
  if constexpr (Columns<D>::kTail) sum += dot_pair<T>(a.tail.at[0], b.tail.at[0]) + dot_pair<T>(a.tail.at[1], b.tail.at[1]);
  return quad_sum(sum);
}

template <class T, int D, int KEYS, int WARPS, int SLICES>
struct QueriesBackward {
  static constexpr int kThreads = 32 * WARPS, kGroups = WARPS / SLICES, kQueries = 16 * kGroups;
  static constexpr int kKeyPitch = Columns<D>::kMatrixPitch, kValuePitch = Columns<D>::kPiecesPitch;
  static constexpr int kStage = KEYS * (kKeyPitch + kValuePitch);  // elements
  static constexpr int kExchangePitch = KEYS + 8;                  // floats
  static constexpr int kExchange = SLICES > 1 ? WARPS * 16 * kExchangePitch : 0;
  static constexpr int kShared = 2 * kStage * static_cast<int>(sizeof(T)) + 2 * kExchange * static_cast<int>(sizeof(float));
  static_assert(SLICES == 1 || D % (16 * SLICES) == 0, "a slice has whole steps of a product");
};

// dQ of kQueries queries of a head, and their delta. Grid: B H ceil(L / kQueries).
template <class T, int D, int KEYS, int WARPS, int SLICES>
__global__ void __launch_bounds__(32 * WARPS, 1) queries_backward(Call<T> call, Gradient<T> gradient) {
  using Shape = QueriesBackward<T, D, KEYS, WARPS, SLICES>;
  constexpr int N = KEYS / 8, kOwn = D / SLICES;  // columns of a warp
  DYNAMIC_SHARED(memory);
  T* stages = reinterpret_cast<T*>(memory);
  float* exchange = reinterpret_cast<float*>(stages + 2 * Shape::kStage);

  const unsigned blocks = (static_cast<unsigned>(call.queries) + Shape::kQueries - 1) / Shape::kQueries;
  const Head<T> head(call, static_cast<int>(blockIdx.x / blocks));
  const Reading reading(call);
  const int warp = static_cast<int>(threadIdx.x) / 32, group = warp / SLICES, slice = warp % SLICES, column = kOwn * slice;
  const int first_query = static_cast<int>(blockIdx.x % blocks) * Shape::kQueries + 16 * group;
  const int query[2] = {first_query + lane() / 4, first_query + lane() / 4 + 8};
  const auto readable = [&](int key) { return head.readable(key); };
  const auto copy = [&](int first_key) {
    T* keys = stages + first_key / KEYS % 2 * Shape::kStage;
    T* values = keys + KEYS * Shape::kKeyPitch;
    constexpr int kColumns = Columns<D>::kContracted;
    copy_rows<T, kColumns, Shape::kKeyPitch, Shape::kThreads>(keys, head.k, call.k.stride, first_key, KEYS, call.keys, call.D,
                                                              readable);
    copy_rows<T, kColumns, Shape::kValuePitch, Shape::kThreads>(values, head.v, call.v.stride, first_key, KEYS, call.keys,
                                                                call.D, readable);
    cp_async_commit();
  };

  copy(0);
  LeftTile<T, kOwn> q[1], grad[1];
  q[0].template load<Order::matrix>(head.q + column, call.q.stride, first_query, call.queries, call.D - column);
  grad[0].template load<Order::pieces>(gradient.grad.of(head.b, head.h) + column, gradient.grad.stride, first_query,
                                       call.queries, call.D - column);
  float delta[2];
  {
    LeftTile<T, kOwn> out;
    out.template load<Order::pieces>(gradient.out.of(head.b, head.h) + column, gradient.out.stride, first_query, call.queries,
                                     call.D - column);
    delta[0] = dot_row(out.upper, grad[0].upper), delta[1] = dot_row(out.lower, grad[0].lower);
  }
  if constexpr (SLICES > 1) {
    float* of_group = exchange + group * SLICES * 16;
    if (lane() % 4 == 0) {
      of_group[16 * slice + lane() / 4] = delta[0];
      of_group[16 * slice + lane() / 4 + 8] = delta[1];
    }
    __syncthreads();
    delta[0] = delta[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
      delta[0] += of_group[16 * i + lane() / 4];
      delta[1] += of_group[16 * i + lane() / 4 + 8];
    }
  }
  float lse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t at = int64_t(head.index) * call.queries + query[r];
    const float row_lse = query[r] < call.queries ? gradient.lse[at] : -INFINITY;
    if (gradient.grad_lse != nullptr && query[r] < call.queries) delta[r] -= gradient.grad_lse[at];
    if (row_lse == -INFINITY) delta[r] = 0.0f;
    lse[r] = exponent_of_lse(row_lse);
    if (slice == 0 && lane() % 4 == 0 && query[r] < call.queries) gradient.delta[at] = delta[r];
  }

  float d[1][kOwn / 8][4] = {};
  for (int first_key = 0; first_key < call.keys; first_key += KEYS) {
    cp_async_wait<0>();
    __syncthreads();  // these keys are there for all, and all are done with those before, which the next replace
    if (first_key + KEYS < call.keys) copy(first_key + KEYS);
    const T* keys = stages + first_key / KEYS % 2 * Shape::kStage;
    const T* values = keys + KEYS * Shape::kKeyPitch;

    float score[1][N][4], dp[N][4];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float s[1][4] = {}, p[1][4] = {};
      multiply_rows<Order::matrix, T, kOwn, Shape::kKeyPitch>(s, q, keys + 8 * n * Shape::kKeyPitch + column);
      multiply_rows<Order::pieces, T, kOwn, Shape::kValuePitch>(p, grad, values + 8 * n * Shape::kValuePitch + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) score[0][n][i] = s[0][i], dp[n][i] = p[0][i];
    }
    if constexpr (SLICES > 1) {
      float* of_group = exchange + group * SLICES * 16 * Shape::kExchangePitch;
      put_slice<Shape::kExchangePitch>(score[0], of_group, slice);
      put_slice<Shape::kExchangePitch>(dp, of_group + Shape::kExchange, slice);
      __syncthreads();
      add_slices<SLICES, Shape::kExchangePitch>(score[0], of_group);
      add_slices<SLICES, Shape::kExchangePitch>(dp, of_group + Shape::kExchange);
    }
    read_scores(score, call, head, first_query, first_key);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[0][n][i] = probability(score[0][n][i], reading.exponent, lse[i / 2]) * (dp[n][i] - delta[i / 2]);
      }
    }
    add_values<T, Shape::kKeyPitch>(d, score, keys + column, call.keys - first_key);
  }
  const int64_t stride = int64_t(call.heads) * call.width;
  T* rows = gradient.dq + int64_t(head.b) * call.queries * stride + head.h * call.width + column;
  const float scale = call.scale, factor[2] = {scale, scale};
  store_tile(rows + query[0] * stride, rows + query[1] * stride, query[0] < call.queries, query[1] < call.queries,
             call.width - column, d[0], factor);
}

template <class T, int D, int QUERIES, int WARPS, int SLICES>
struct KeysBackward {
  static constexpr int kThreads = 32 * WARPS, kGroups = WARPS / SLICES, kKeys = 16 * kGroups;
  static constexpr int kPitch = Columns<D>::kMatrixPitch;
  static constexpr int kStage = 2 * QUERIES * kPitch;  // elements
  static constexpr int kExchangePitch = QUERIES + 8;   // floats
  static constexpr int kExchange = SLICES > 1 ? WARPS * 16 * kExchangePitch : 0;
  static constexpr int kFloats = 2 * 2 * QUERIES + 2 * kExchange;
  static constexpr int kShared = 2 * kStage * static_cast<int>(sizeof(T)) + kFloats * static_cast<int>(sizeof(float));
  static_assert(SLICES == 1 || D % (16 * SLICES) == 0, "a slice has whole steps of a product");
};

// Rows g and g + 8 of a result times `factor`, as they are.
template <int TILES>
__device__ void store_wide(float* upper, float* lower, bool has_upper, bool has_lower, int width, const float (&d)[TILES][4],
                           float factor) {
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 8 * n + lane() % 4 * 2 + i % 2;
      if (column < width && (i < 2 ? has_upper : has_lower)) (i < 2 ? upper : lower)[column] = d[n][i] * factor;
    }
  }
}

// dK and dV of kKeys keys of a head, from one of `chunks` chunks of its queries. Grid: B H ceil(S / kKeys) chunks.
template <class T, int D, int QUERIES, int WARPS, int SLICES>
__global__ void __launch_bounds__(32 * WARPS, 1)
    keys_backward(Call<T> call, Gradient<T> gradient, int chunks, int64_t chunk_stride) {
  using Shape = KeysBackward<T, D, QUERIES, WARPS, SLICES>;
  constexpr int N = QUERIES / 8, kOwn = D / SLICES, kPitch = Shape::kPitch;  // kOwn: columns of a warp
  DYNAMIC_SHARED(memory);
  T* stages = reinterpret_cast<T*>(memory);
  float* rows = reinterpret_cast<float*>(stages + 2 * Shape::kStage);  // lse and delta of each stage
  float* exchange = rows + 2 * 2 * QUERIES;

  const unsigned blocks = (static_cast<unsigned>(call.keys) + Shape::kKeys - 1) / Shape::kKeys * static_cast<unsigned>(chunks);
  const Head<T> head(call, static_cast<int>(blockIdx.x / blocks));
  const Reading reading(call);
  const int place = static_cast<int>(blockIdx.x % blocks), chunk = place % chunks;
  const int warp = static_cast<int>(threadIdx.x) / 32, group = warp / SLICES, slice = warp % SLICES, column = kOwn * slice;
  const int first_key = place / chunks * Shape::kKeys + 16 * group;
  const int key[2] = {first_key + lane() / 4, first_key + lane() / 4 + 8};

  const int tiles = (call.queries + QUERIES - 1) / QUERIES, chunk_tiles = (tiles + chunks - 1) / chunks;
  const int begin = chunk * chunk_tiles, end = min(tiles, begin + chunk_tiles);
  const auto any = [](int) { return true; };
  const auto copy = [&](int tile) {
    constexpr int kColumns = Columns<D>::kContracted;
    const int first_query = tile * QUERIES;
    T* queries = stages + tile % 2 * Shape::kStage;
    T* grads = queries + QUERIES * kPitch;
    copy_rows<T, kColumns, kPitch, Shape::kThreads>(queries, head.q, call.q.stride, first_query, QUERIES, call.queries, call.D,
                                                    any);
    copy_rows<T, kColumns, kPitch, Shape::kThreads>(grads, gradient.grad.of(head.b, head.h), gradient.grad.stride, first_query,
                                                    QUERIES, call.queries, call.D, any);
    // Queries past the last are zeros, and so are their lse and delta: they add nothing.
    for (int i = static_cast<int>(threadIdx.x); i < 2 * QUERIES; i += Shape::kThreads) {
      const int query = first_query + i % QUERIES;
      const float* from = (i < QUERIES ? gradient.lse : gradient.delta) + int64_t(head.index) * call.queries + query;
      cp_async<4>(rows + tile % 2 * 2 * QUERIES + i, from, query < call.queries);
    }
    cp_async_commit();
  };

  if (begin < end) copy(begin);
  LeftTile<T, kOwn> k[1], v[1];
  const bool read[2] = {key[0] < call.keys && head.readable(key[0]), key[1] < call.keys && head.readable(key[1])};
  k[0].template load_rows<Order::matrix>(head.k + column, call.k.stride, first_key, read, call.D - column);
  v[0].template load_rows<Order::matrix>(head.v + column, call.v.stride, first_key, read, call.D - column);
  float dk[1][kOwn / 8][4] = {}, dv[1][kOwn / 8][4] = {};
  for (int tile = begin; tile < end; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // these queries are there for all, and all are done with those before, which the next replace
    if (tile + 1 < end) copy(tile + 1);
    const T* queries = stages + tile % 2 * Shape::kStage;
    const T* grads = queries + QUERIES * kPitch;
    const float* lse = rows + tile % 2 * 2 * QUERIES;
    const float* delta = lse + QUERIES;

    // Transposed: rows are keys, columns queries.
    float p[1][N][4], ds[1][N][4];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float s[1][4] = {}, dp[1][4] = {};
      multiply_rows<Order::matrix, T, kOwn, kPitch>(s, k, queries + 8 * n * kPitch + column);
      multiply_rows<Order::matrix, T, kOwn, kPitch>(dp, v, grads + 8 * n * kPitch + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) p[0][n][i] = s[0][i], ds[0][n][i] = dp[0][i];
    }
    if constexpr (SLICES > 1) {
      float* of_group = exchange + group * SLICES * 16 * Shape::kExchangePitch;
      put_slice<Shape::kExchangePitch>(p[0], of_group, slice);
      put_slice<Shape::kExchangePitch>(ds[0], of_group + Shape::kExchange, slice);
      __syncthreads();
      add_slices<SLICES, Shape::kExchangePitch>(p[0], of_group);
      add_slices<SLICES, Shape::kExchangePitch>(ds[0], of_group + Shape::kExchange);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 8 * n + lane() % 4 * 2 + i % 2, query = tile * QUERIES + at;
        float score = p[0][n][i];
        if (reading.scaled_first) score = read_score(call, head, score, query, key[i / 2]);
        p[0][n][i] = probability(score, reading.exponent, exponent_of_lse(lse[at]));
        ds[0][n][i] = p[0][n][i] * (ds[0][n][i] - delta[at]);
      }
    }
    add_values<T, kPitch>(dv, p, grads + column, QUERIES);
    add_values<T, kPitch>(dk, ds, queries + column, QUERIES);
  }

  const bool has_upper = key[0] < call.keys, has_lower = key[1] < call.keys;
  const int64_t stride = int64_t(call.heads) * call.width;
  const int64_t base = int64_t(head.b) * call.keys * stride + head.h * call.width + column;
  const int64_t upper = base + key[0] * stride, lower = base + key[1] * stride;
  const float scale = call.scale;
  if (gradient.dk_parts != nullptr) {
    float *dk_part = gradient.dk_parts + chunk * chunk_stride, *dv_part = gradient.dv_parts + chunk * chunk_stride;
    store_wide(dk_part + upper, dk_part + lower, has_upper, has_lower, call.width - column, dk[0], scale);
    store_wide(dv_part + upper, dv_part + lower, has_upper, has_lower, call.width - column, dv[0], 1.0f);
  } else {
    const float by_scale[2] = {scale, scale}, by_one[2] = {1.0f, 1.0f};
    store_tile(gradient.dk + upper, gradient.dk + lower, has_upper, has_lower, call.width - column, dk[0], by_scale);
    store_tile(gradient.dv + upper, gradient.dv + lower, has_upper, has_lower, call.width - column, dv[0], by_one);
  }
}

// (chunks, count) => (count), added in the order of chunks.
template <class T>
__global__ void __launch_bounds__(256) add_chunks(const float* parts, T* total, int64_t count, int chunks) {
  for (int64_t i = blockIdx.x * int64_t(256) + threadIdx.x; i < count; i += gridDim.x * int64_t(256)) {
    float sum = 0.0f;
    for (int chunk = 0; chunk < chunks; ++chunk) sum += parts[chunk * count + i];
    total[i] = narrow<T>(sum);
  }
}

}  // namespace ldmkit::attention
