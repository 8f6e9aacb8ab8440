// Attention without tensor cores: fp32 in true fp32, and fp64.
//
// A warp owns R rows (queries, or keys in their own gradient) and meets the others 32 at a time, one a lane for products over
// D; for products over the others a lane has two of each 64 columns of the result. D is walked in chunks of 64 columns.
#pragma once

#include "cross_attention_fragments.cuh"

namespace ldmkit::attention {

constexpr int kPlainWarps = 4, kPlainThreads = 32 * kPlainWarps, kOthers = 32, kChunk = 64;
constexpr int kPlainPitch = kChunk + 4;  // reading 16 bytes, eight lanes meet all banks

// Rows of one head of a tensor.
template <class T>
struct Source {
  const T* rows;
  int64_t stride;
  int end;
  const uint8_t* hidden;  // null, or rows that count as zeros
};

template <class T, int R, int CHUNKS>
struct Plain {
  using A = typename Compute<T>::type;
  static constexpr int kRows = R * kPlainWarps, kPack = 16 / sizeof(A);
  static constexpr int kShared = static_cast<int>(sizeof(A)) * ((kRows + kOthers) * kPlainPitch + kRows * kOthers);

  A *left, *right, *weights;  // (kRows, kPlainPitch), (kOthers, kPlainPitch), (kRows, kOthers)
  int width, warp;

  __device__ Plain(unsigned char* memory, int width)
      : left(reinterpret_cast<A*>(memory)),
        right(left + kRows * kPlainPitch),
        weights(right + kOthers * kPlainPitch),
        width(width),
        warp(static_cast<int>(threadIdx.x) / 32) {}

  // A chunk of columns of `count` rows from `first` on.
  __device__ void load(A* shared, int count, const Source<T>& from, int first, int chunk) const {
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < count * kChunk; i += kPlainThreads) {
      const int row = first + i / kChunk, column = chunk * kChunk + i % kChunk;
      const bool valid = row < from.end && column < width && (from.hidden == nullptr || from.hidden[row] == 0);
      shared[i / kChunk * kPlainPitch + i % kChunk] = valid ? widen(from.rows[row * from.stride + column]) : A(0);
    }
  }

  // The products over D of this warp's rows and of each lane's other.
  __device__ void multiply(A (&value)[R], const Source<T>& own, int first_own, const Source<T>& others, int first_other) const {
#pragma unroll
    for (int r = 0; r < R; ++r) value[r] = A(0);
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      __syncthreads();
      load(left, kRows, own, first_own, chunk);
      load(right, kOthers, others, first_other, chunk);
      __syncthreads();
      for (int c = 0; c < kChunk; c += kPack) {
        const auto y = *reinterpret_cast<const Pack<A, kPack>*>(right + lane() * kPlainPitch + c);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const auto x = *reinterpret_cast<const Pack<A, kPack>*>(left + (warp * R + r) * kPlainPitch + c);
#pragma unroll
          for (int i = 0; i < kPack; ++i) value[r] += x.at[i] * y.at[i];
        }
      }
    }
  }

  // sum[r] += the others' rows, each times the weight its lane has for row r.
  __device__ void add(A (&sum)[R][CHUNKS][2], const A (&weight)[R], const Source<T>& others, int first_other) const {
    A* own = weights + warp * R * kOthers;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < R; ++r) own[r * kOthers + lane()] = weight[r];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      __syncthreads();
      load(right, kOthers, others, first_other, chunk);
      __syncthreads();
      for (int j = 0; j < kOthers; j += kPack) {
        Pack<A, 2> y[kPack];
#pragma unroll
        for (int i = 0; i < kPack; ++i) y[i] = *reinterpret_cast<const Pack<A, 2>*>(right + (j + i) * kPlainPitch + 2 * lane());
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const auto w = *reinterpret_cast<const Pack<A, kPack>*>(own + r * kOthers + j);
#pragma unroll
          for (int i = 0; i < kPack; ++i) {
            sum[r][chunk][0] += w.at[i] * y[i].at[0];
            sum[r][chunk][1] += w.at[i] * y[i].at[1];
          }
        }
      }
    }
  }

  // Writes row r of a dense (B, rows, H, width), times `factor`.
  __device__ void store(T* row, const A (&sum)[CHUNKS][2], A factor) const {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = chunk * kChunk + 2 * lane() + i;
        if (column < width) row[column] = narrow<T>(sum[chunk][i] * factor);
      }
    }
  }
};

template <class A>
__device__ inline A warp_sum(A x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
template <class A>
__device__ inline A warp_max(A x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = max(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

// A scaled, masked score; -inf past the last query and key.
template <class T, class A>
__device__ inline A plain_score(const Call<T>& call, const Head<T>& head, A score, int query, int key) {
  return query < call.queries && key < call.keys ? masked(score * call.scale, head.bias(query, key)) : -A(INFINITY);
}

// Grid: B H ceil(L / kRows).
template <class T, int R, int CHUNKS>
__global__ void __launch_bounds__(kPlainThreads, 1) plain_forward(Call<T> call, T* out, typename Compute<T>::type* lse) {
  using Shape = Plain<T, R, CHUNKS>;
  using A = typename Shape::A;
  DYNAMIC_SHARED(memory);
  const Shape plain(memory, call.width);
  const unsigned blocks = (static_cast<unsigned>(call.queries) + Shape::kRows - 1) / Shape::kRows;
  const int index = static_cast<int>(blockIdx.x / blocks);
  const Head<T> head(call, index);
  const int first = static_cast<int>(blockIdx.x % blocks) * Shape::kRows;
  const Source<T> q{head.q, call.q.stride, call.queries, nullptr}, k{head.k, call.k.stride, call.keys, head.hidden},
      v{head.v, call.v.stride, call.keys, head.hidden};

  A sum[R][CHUNKS][2] = {}, top[R], total[R] = {};
#pragma unroll
  for (int r = 0; r < R; ++r) top[r] = -A(INFINITY);
  for (int first_key = 0; first_key < call.keys; first_key += kOthers) {
    A p[R];
    plain.multiply(p, q, first, k, first_key);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const A score = plain_score(call, head, p[r], first + plain.warp * R + r, first_key + lane());
      const A higher = max(top[r], warp_max(score)), reference = higher == -A(INFINITY) ? A(0) : higher;
      const A shrink = exponential(top[r] - reference);
      p[r] = exponential(score - reference);
      total[r] = total[r] * shrink + warp_sum(p[r]);
      top[r] = higher;
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk) sum[r][chunk][0] *= shrink, sum[r][chunk][1] *= shrink;
    }
    plain.add(sum, p, v, first_key);
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int query = first + plain.warp * R + r;
    if (query >= call.queries) continue;
    // A row without keys has total 0 and gives 0; NaN stays NaN.
    plain.store(out + ((int64_t(head.b) * call.queries + query) * call.heads + head.h) * call.width, sum[r],
                total[r] == A(0) ? A(0) : A(1) / total[r]);
    if (lane() == 0)
      lse[int64_t(index) * call.queries + query] = total[r] == A(0) ? -A(INFINITY) : top[r] + logarithm(total[r]);
  }
}

// exp(score - lse), at most 1; 0 for a row without keys. NaN stays NaN.
template <class A>
__device__ inline A plain_probability(A score, A lse) {
  if (lse == -A(INFINITY)) return A(0);
  return exponential(score - lse > A(0) ? A(0) : score - lse);
}

// dQ, and delta. Grid: B H ceil(L / kRows).
template <class T, int R, int CHUNKS>
__global__ void __launch_bounds__(kPlainThreads, 1) plain_queries_backward(Call<T> call, Gradient<T> gradient) {
  using Shape = Plain<T, R, CHUNKS>;
  using A = typename Shape::A;
  DYNAMIC_SHARED(memory);
  const Shape plain(memory, call.width);
  const unsigned blocks = (static_cast<unsigned>(call.queries) + Shape::kRows - 1) / Shape::kRows;
  const int index = static_cast<int>(blockIdx.x / blocks);
  const Head<T> head(call, index);
  const int first = static_cast<int>(blockIdx.x % blocks) * Shape::kRows;
  const T* grad_rows = gradient.grad.of(head.b, head.h);
  const T* out_rows = gradient.out.of(head.b, head.h);
  const Source<T> q{head.q, call.q.stride, call.queries, nullptr}, grad{grad_rows, gradient.grad.stride, call.queries, nullptr},
      k{head.k, call.k.stride, call.keys, head.hidden}, v{head.v, call.v.stride, call.keys, head.hidden};

  A lse[R], delta[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int query = first + plain.warp * R + r;
    lse[r] = -A(INFINITY), delta[r] = A(0);
    if (query >= call.queries) continue;
    const int64_t at = int64_t(index) * call.queries + query;
    A dot = A(0);
    for (int column = lane(); column < call.width; column += 32) {
      dot += widen(grad_rows[query * gradient.grad.stride + column]) * widen(out_rows[query * gradient.out.stride + column]);
    }
    lse[r] = gradient.lse[at];
    delta[r] = warp_sum(dot) - (gradient.grad_lse != nullptr ? gradient.grad_lse[at] : A(0));
    if (lse[r] == -A(INFINITY)) delta[r] = A(0);
    if (lane() == 0) gradient.delta[at] = delta[r];
  }
  A sum[R][CHUNKS][2] = {};
  for (int first_key = 0; first_key < call.keys; first_key += kOthers) {
    A score[R], ds[R];
    plain.multiply(score, q, first, k, first_key);
    plain.multiply(ds, grad, first, v, first_key);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const A s = plain_score(call, head, score[r], first + plain.warp * R + r, first_key + lane());
      ds[r] = plain_probability(s, lse[r]) * (ds[r] - delta[r]);
    }
    plain.add(sum, ds, k, first_key);
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int query = first + plain.warp * R + r;
    if (query >= call.queries) continue;
    plain.store(gradient.dq + ((int64_t(head.b) * call.queries + query) * call.heads + head.h) * call.width, sum[r],
                call.scale);
  }
}

// dK and dV. Grid: B H ceil(S / kRows).
template <class T, int R, int CHUNKS>
__global__ void __launch_bounds__(kPlainThreads, 1) plain_keys_backward(Call<T> call, Gradient<T> gradient) {
  using Shape = Plain<T, R, CHUNKS>;
  using A = typename Shape::A;
  DYNAMIC_SHARED(memory);
  const Shape plain(memory, call.width);
  const unsigned blocks = (static_cast<unsigned>(call.keys) + Shape::kRows - 1) / Shape::kRows;
  const int index = static_cast<int>(blockIdx.x / blocks);
  const Head<T> head(call, index);
  const int first = static_cast<int>(blockIdx.x % blocks) * Shape::kRows;
  const Source<T> q{head.q, call.q.stride, call.queries, nullptr},
      grad{gradient.grad.of(head.b, head.h), gradient.grad.stride, call.queries, nullptr},
      k{head.k, call.k.stride, call.keys, head.hidden}, v{head.v, call.v.stride, call.keys, head.hidden};

  A dk[R][CHUNKS][2] = {}, dv[R][CHUNKS][2] = {};
  for (int first_query = 0; first_query < call.queries; first_query += kOthers) {
    const int query = first_query + lane();
    const int64_t at = int64_t(index) * call.queries + query;
    const A lse = query < call.queries ? gradient.lse[at] : -A(INFINITY),
            delta = query < call.queries ? gradient.delta[at] : A(0);
    A p[R], ds[R];
    plain.multiply(p, k, first, q, first_query);
    plain.multiply(ds, v, first, grad, first_query);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      p[r] = plain_probability(plain_score(call, head, p[r], query, first + plain.warp * R + r), lse);
      ds[r] = p[r] * (ds[r] - delta);
    }
    plain.add(dv, p, grad, first_query);
    plain.add(dk, ds, q, first_query);
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int key = first + plain.warp * R + r;
    if (key >= call.keys) continue;
    const int64_t at = ((int64_t(head.b) * call.keys + key) * call.heads + head.h) * call.width;
    plain.store(gradient.dk + at, dk[r], call.scale);
    plain.store(gradient.dv + at, dv[r], A(1));
  }
}

}  // namespace ldmkit::attention
