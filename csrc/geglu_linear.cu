// GEGLU of a linear layer for CUDA: one block computes a tile of values and the tile of their gates, so that what goes through memory
// is x, weight and n columns of output instead of three times 2n more. fp16 and bf16 run on tensor cores, fp32 and fp64 do not.
//
// A block of 128 rows and 64 outputs multiplies 128 rows of x by 128 rows of weight, 64 of values and 64 of gates. Slices of 64 bytes
// of k travel through a ring of stages (cp.async), so that copies run ahead of the arithmetic. Tiles are the same for all sizes:
// a row's result depends on no other row.
#include "geglu_linear.h"

#include <algorithm>
#include <cstdint>

#include "common.cuh"
#include "gelu.cuh"

namespace ldmkit {
namespace {

constexpr int kRows = 128, kOutputs = 64;         // of a block
constexpr int kSlice = 64, kPitch = kSlice + 16;  // bytes of k in a stage, and from row to row: no two of 8 rows share a bank
constexpr int kStages = 4, kStage = (kRows + 2 * kOutputs) * kPitch;
constexpr int kShared = kStages * kStage;  // 80 KiB: two blocks fit a multiprocessor of an A100 or H100, one that of other GPUs
constexpr int kGroup = 8;                  // tiles of rows that run beside each other, so that they share weight in the L2 cache

enum class Mode { forward, keep, backward };  // writes y; y and hidden; the gradient of hidden

template <class T>
struct Task {
  const T* x;
  int64_t x_stride;
  const T* weight;
  int64_t weight_stride;
  const T* bias;
  const T* grad;
  int64_t grad_stride;
  T *y, *hidden;  // hidden: or its gradient
  int64_t rows, n, k;
  bool packed;  // 16 bytes an access to y, hidden and grad
};

// The block's first row and output. Blocks go down a column of kGroup tiles, then to the next column.
struct Place {
  int64_t row, output;
};
__device__ inline Place place_of_block(int64_t rows, int64_t n) {
  const int64_t down = (rows + kRows - 1) / kRows, across = (n + kOutputs - 1) / kOutputs;
  const int64_t group = blockIdx.x / (kGroup * across), rest = blockIdx.x % (kGroup * across);
  const int64_t height = min(down - group * kGroup, int64_t(kGroup));
  return {(group * kGroup + rest % height) * kRows, rest / height * kOutputs};
}

// Starts copying the slice of k at `from` into a stage: rows of x, of value weights, of gate weights. Zeros stand for what is outside.
template <class T, int Threads>
__device__ inline void load_slice(const Task<T>& task, const Place& place, int64_t from, unsigned char* stage) {
  constexpr int kPieces = kSlice / 16, kAtOnce = Threads / kPieces;  // rows
  const int first = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
  const int64_t column = from + piece * (16 / sizeof(T));
#pragma unroll
  for (int i = 0; i < (kRows + 2 * kOutputs) / kAtOnce; ++i) {
    const int row = first + i * kAtOnce;
    const T* source;
    bool inside = column < task.k;
    if (i < kRows / kAtOnce) {
      source = task.x + (place.row + row) * task.x_stride;
      inside = inside && place.row + row < task.rows;
    } else {
      const bool is_gate = i >= (kRows + kOutputs) / kAtOnce;
      const int64_t output = place.output + row - kRows - (is_gate ? kOutputs : 0);
      source = task.weight + (output + (is_gate ? task.n : 0)) * task.weight_stride;
      inside = inside && output < task.n;
    }
    cp_async<16>(stage + row * kPitch + piece * 16, source + column, inside);
  }
}

// Runs compute(stage) for every slice of k, in order; the next kStages - 1 are on their way meanwhile.
template <class T, int Threads, class Compute>
__device__ inline void for_each_slice(const Task<T>& task, const Place& place, unsigned char* ring, const Compute& compute) {
  constexpr int kStep = kSlice / sizeof(T);
  const int slices = int((task.k + kStep - 1) / kStep);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < slices) load_slice<T, Threads>(task, place, int64_t(i) * kStep, ring + i * kStage);
    cp_async_commit();
  }
  for (int i = 0; i < slices; ++i) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // slice i is here for all, and all are done with the stage that the next one goes to
    const int next = i + kStages - 1;
    if (next < slices) load_slice<T, Threads>(task, place, int64_t(next) * kStep, ring + next % kStages * kStage);
    cp_async_commit();
    compute(ring + i % kStages * kStage);
  }
  cp_async_wait<0>();
  __syncthreads();
}

// What becomes of one value and its gate, bias included: y; or, from the gradient of y, those of value and gate.
template <class T, class C>
__device__ inline C gated(C value, C gate) {
  return value * (gate * gelu_parts<T>(gate).cdf);
}
template <class T, class C>
__device__ inline void gate_backward(C incoming, C value, C gate, T* grad_value, T* grad_gate) {
  const auto [cdf, slope] = gelu_parts<T>(gate);
  *grad_value = narrow<T>(incoming * (gate * cdf));
  *grad_gate = narrow<T>(incoming * value * (cdf + slope));
}

// ------------------------------------------------------------------------------------------------------------- fp16, bf16

constexpr int kMatrixThreads = 128;  // 2 x 2 warps of 64 rows and 32 outputs

// Tiles of results lie in shared memory (over the ring) while they change hands: rows of kOutputs, 16 bytes apart for the banks.
constexpr int kTilePitch = kOutputs + 8;

template <class T>
__device__ inline void load_tile(const T* from, int64_t stride, int rows, int columns, bool packed, T* tile) {
  if (packed) {
    constexpr int kPieces = kOutputs / 8;
    for (int i = threadIdx.x; i < rows * kPieces; i += kMatrixThreads) {
      const int row = i / kPieces, column = i % kPieces * 8;
      if (column < columns)
        *reinterpret_cast<Pack<T, 8>*>(tile + row * kTilePitch + column) =
            *reinterpret_cast<const Pack<T, 8>*>(from + row * stride + column);
    }
  } else {
    for (int i = threadIdx.x; i < rows * kOutputs; i += kMatrixThreads) {
      const int row = i / kOutputs, column = i % kOutputs;
      if (column < columns) tile[row * kTilePitch + column] = from[row * stride + column];
    }
  }
}

template <class T>
__device__ inline void store_tile(const T* tile, int rows, int columns, bool packed, T* to, int64_t stride) {
  if (packed) {
    constexpr int kPieces = kOutputs / 8;
    for (int i = threadIdx.x; i < rows * kPieces; i += kMatrixThreads) {
      const int row = i / kPieces, column = i % kPieces * 8;
      if (column < columns)
        *reinterpret_cast<Pack<T, 8>*>(to + row * stride + column) =
            *reinterpret_cast<const Pack<T, 8>*>(tile + row * kTilePitch + column);
    }
  } else {
    for (int i = threadIdx.x; i < rows * kOutputs; i += kMatrixThreads) {
      const int row = i / kOutputs, column = i % kOutputs;
      if (column < columns) to[row * stride + column] = tile[row * kTilePitch + column];
    }
  }
}

template <class T, Mode mode>
__global__ void __launch_bounds__(kMatrixThreads, 2) on_tensor_cores(Task<T> task) {
  DYNAMIC_SHARED(shared);
  const Place place = place_of_block(task.rows, task.n);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / 2 * 64, warp_output = warp % 2 * 32;

  // sums[i][j]: 16 rows, 8 outputs; j of values, then of gates. Registers as mma_m16n8k16 has them.
  float sums[4][8][4] = {};
  for_each_slice<T, kMatrixThreads>(task, place, shared, [&](const unsigned char* stage) {
#pragma unroll
    for (int half = 0; half < kSlice; half += 32) {  // 16 elements of k
      uint32_t x[4][4], weight[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        ldmatrix_x4(x[i], stage + (warp_row + 16 * i + lane % 16) * kPitch + half + lane / 16 * 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // 16 rows of weight, of values for j < 2
        const int first = kRows + (j < 2 ? 0 : kOutputs) + warp_output + j % 2 * 16;
        ldmatrix_x4(weight[j], stage + (first + lane / 16 * 8 + lane % 8) * kPitch + half + lane / 8 % 2 * 16);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t b[2] = {weight[j / 2][j % 2 * 2], weight[j / 2][j % 2 * 2 + 1]};
          mma_m16n8k16<T>(sums[i][j], x[i], b);
        }
    }
  });

  const int rows = int(min(task.rows - place.row, int64_t(kRows))), columns = int(min(task.n - place.output, int64_t(kOutputs)));
  T* tiles = reinterpret_cast<T*>(shared);
  constexpr int kTile = kRows * kTilePitch;
  if constexpr (mode == Mode::backward) {
    load_tile(task.grad + place.row * task.grad_stride + place.output, task.grad_stride, rows, columns, task.packed, tiles);
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    __syncwarp();  // no load moves up from here, into registers that are not free yet
    const int output = warp_output + 8 * j + lane % 4 * 2;
    float bias[2][2] = {};
    if (task.bias != nullptr) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (output + e < columns) {
          bias[0][e] = widen(task.bias[place.output + output + e]);
          bias[1][e] = widen(task.bias[task.n + place.output + output + e]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* at = tiles + (warp_row + 16 * i + 8 * half + lane / 4) * kTilePitch + output;
        Pack<T, 2> first, second, third;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float value = sums[i][j][2 * half + e] + bias[0][e], gate = sums[i][j + 4][2 * half + e] + bias[1][e];
          if constexpr (mode == Mode::backward) {
            gate_backward(widen(at[e]), value, gate, &first.at[e], &second.at[e]);
          } else {
            first.at[e] = narrow<T>(gated<T>(value, gate));
            second.at[e] = narrow<T>(value);
            third.at[e] = narrow<T>(gate);
          }
        }
        *reinterpret_cast<Pack<T, 2>*>(at) = first;
        if constexpr (mode != Mode::forward) *reinterpret_cast<Pack<T, 2>*>(at + kTile) = second;
        if constexpr (mode == Mode::keep) *reinterpret_cast<Pack<T, 2>*>(at + 2 * kTile) = third;
      }
  }
  __syncthreads();
  T* hidden = task.hidden + place.row * 2 * task.n + place.output;
  if constexpr (mode != Mode::backward)
    store_tile(tiles, rows, columns, task.packed, task.y + place.row * task.n + place.output, task.n);
  if constexpr (mode == Mode::keep) tiles += kTile;
  if constexpr (mode != Mode::forward) {
    store_tile(tiles, rows, columns, task.packed, hidden, 2 * task.n);
    store_tile(tiles + kTile, rows, columns, task.packed, hidden + task.n, 2 * task.n);
  }
}

// -------------------------------------------------------------------------------------------------------------- fp32, fp64

constexpr int kPlainThreads = 256;  // 16 x 16, each with 8 rows and 4 outputs, 16 apart

template <class T, Mode mode>
__global__ void __launch_bounds__(kPlainThreads) on_plain_cores(Task<T> task) {
  DYNAMIC_SHARED(shared);
  constexpr int V = 16 / sizeof(T);
  using Piece = Pack<T, V>;
  const Place place = place_of_block(task.rows, task.n);
  const int first_row = threadIdx.x / 16, first_output = threadIdx.x % 16;

  T sums[8][8] = {};  // outputs: 4 values, then 4 gates
  for_each_slice<T, kPlainThreads>(task, place, shared, [&](const unsigned char* stage) {
#pragma unroll 1
    for (int piece = 0; piece < kSlice; piece += 16) {
      Piece x[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = *reinterpret_cast<const Piece*>(stage + (first_row + 16 * i) * kPitch + piece);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const Piece weight = *reinterpret_cast<const Piece*>(stage + (kRows + first_output + 16 * j) * kPitch + piece);
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int e = 0; e < V; ++e) sums[i][j] += x[i].at[e] * weight.at[e];
      }
    }
  });

#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t output = place.output + first_output + 16 * j;
    if (output >= task.n) continue;
    const T value_bias = task.bias == nullptr ? T(0) : task.bias[output];
    const T gate_bias = task.bias == nullptr ? T(0) : task.bias[task.n + output];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t row = place.row + first_row + 16 * i;
      if (row >= task.rows) continue;
      const T value = sums[i][j] + value_bias, gate = sums[i][j + 4] + gate_bias;
      T* hidden = task.hidden + row * 2 * task.n + output;
      if constexpr (mode == Mode::backward) {
        gate_backward(task.grad[row * task.grad_stride + output], value, gate, hidden, hidden + task.n);
      } else {
        task.y[row * task.n + output] = gated<T>(value, gate);
        if constexpr (mode == Mode::keep) {
          hidden[0] = value;
          hidden[task.n] = gate;
        }
      }
    }
  }
}

// --------------------------------------------------------------------------------------------------------------- launching

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T, Mode mode>
int launch(const GegluLinear& p, const void* grad, int64_t grad_stride, void* y, void* hidden, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const Task<T> task{static_cast<const T*>(p.x),
                     p.x_stride,
                     static_cast<const T*>(p.weight),
                     p.weight_stride,
                     static_cast<const T*>(p.bias),
                     static_cast<const T*>(grad),
                     grad_stride,
                     static_cast<T*>(y),
                     static_cast<T*>(hidden),
                     p.rows,
                     p.n,
                     p.k,
                     p.n % V == 0 && grad_stride % V == 0 && aligned(grad) && aligned(y) && aligned(hidden)};
  const int64_t blocks = (p.rows + kRows - 1) / kRows * ((p.n + kOutputs - 1) / kOutputs);
  if (blocks > INT32_MAX || p.k > INT32_MAX) return cudaErrorInvalidValue;
  if constexpr (sizeof(T) == 2) {
    return LAUNCH((on_tensor_cores<T, mode>), unsigned(blocks), kMatrixThreads, kShared, stream, task);
  } else {
    return LAUNCH((on_plain_cores<T, mode>), unsigned(blocks), kPlainThreads, kShared, stream, task);
  }
}

template <Mode mode>
int launch_as(const GegluLinear& p, const void* grad, int64_t grad_stride, void* y, void* hidden, void* stream_pointer) {
  if (p.rows == 0 || p.n == 0) return cudaSuccess;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  switch (p.dtype) {
    case Dtype::f32: return launch<float, mode>(p, grad, grad_stride, y, hidden, stream);
    case Dtype::f64: return launch<double, mode>(p, grad, grad_stride, y, hidden, stream);
    case Dtype::f16: return launch<__half, mode>(p, grad, grad_stride, y, hidden, stream);
    case Dtype::bf16: return launch<__nv_bfloat16, mode>(p, grad, grad_stride, y, hidden, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int geglu_linear_forward_cuda(const GegluLinear& problem, void* y, void* hidden, void* stream) {
  if (hidden == nullptr) return launch_as<Mode::forward>(problem, nullptr, 0, y, nullptr, stream);
  return launch_as<Mode::keep>(problem, nullptr, 0, y, hidden, stream);
}

int geglu_linear_backward_cuda(const GegluLinear& problem, const void* grad, int64_t grad_stride, void* grad_hidden, void* stream) {
  return launch_as<Mode::backward>(problem, grad, grad_stride, nullptr, grad_hidden, stream);
}

}  // namespace ldmkit
