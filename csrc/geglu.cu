// GEGLU for CUDA (Shazeer 2020, arXiv:2002.05202, eq. 6): one pass over memory, 16 bytes a thread and access where pointers and
// strides are aligned, one element otherwise.
#include "geglu.h"

#include <algorithm>
#include <cstdint>

#include "common.cuh"
#include "gelu.cuh"

namespace ldmkit {
namespace {

constexpr int kThreads = 256;

// Elements a thread takes at once: 16 bytes; fp64, which only checks use, goes one by one and spares the registers.
template <class T>
constexpr int kPack = sizeof(T) == 8 ? 1 : 16 / sizeof(T);

// Element V * i of the output, counted densely, is at (row, column). Index is 32-bit where it suffices: divisions are cheaper.
template <class T, int V, class Index>
__global__ void __launch_bounds__(kThreads) forward(const T* x, int64_t x_stride, T* y, Index packs, Index packs_per_row, int64_t n) {
  for (Index i = blockIdx.x * Index(kThreads) + threadIdx.x; i < packs; i += gridDim.x * Index(kThreads)) {
    const Index row = i / packs_per_row;
    const T* value = x + int64_t(row) * x_stride + int64_t(i - row * packs_per_row) * V;
    const Pack<T, V> a = *reinterpret_cast<const Pack<T, V>*>(value);
    const Pack<T, V> b = *reinterpret_cast<const Pack<T, V>*>(value + n);
    Pack<T, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const auto gate = widen(b.at[j]);
      out.at[j] = narrow<T>(widen(a.at[j]) * (gate * gelu_parts<T>(gate).cdf));
    }
    *reinterpret_cast<Pack<T, V>*>(y + int64_t(i) * V) = out;
  }
}

template <class T, int V, class Index>
__global__ void __launch_bounds__(kThreads)
    backward(const T* grad, int64_t grad_stride, const T* x, int64_t x_stride, T* grad_x, Index packs, Index packs_per_row, int64_t n) {
  for (Index i = blockIdx.x * Index(kThreads) + threadIdx.x; i < packs; i += gridDim.x * Index(kThreads)) {
    const Index row = i / packs_per_row;
    const int64_t column = int64_t(i - row * packs_per_row) * V;
    const T* value = x + int64_t(row) * x_stride + column;
    T* out = grad_x + int64_t(row) * 2 * n + column;
    const Pack<T, V> g = *reinterpret_cast<const Pack<T, V>*>(grad + int64_t(row) * grad_stride + column);
    const Pack<T, V> a = *reinterpret_cast<const Pack<T, V>*>(value);
    const Pack<T, V> b = *reinterpret_cast<const Pack<T, V>*>(value + n);
    Pack<T, V> grad_value, grad_gate;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const auto incoming = widen(g.at[j]), gate = widen(b.at[j]);
      const auto [cdf, slope] = gelu_parts<T>(gate);
      grad_value.at[j] = narrow<T>(incoming * (gate * cdf));
      grad_gate.at[j] = narrow<T>(incoming * widen(a.at[j]) * (cdf + slope));
    }
    *reinterpret_cast<Pack<T, V>*>(out) = grad_value;
    *reinterpret_cast<Pack<T, V>*>(out + n) = grad_gate;
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int blocks_for(int64_t packs) { return int(std::min<int64_t>((packs + kThreads - 1) / kThreads, 1 << 20)); }

// Small enough that neither the index nor its last grid-sized step leaves 32 bits.
bool fits_32_bits(int64_t packs) { return packs + (int64_t(1) << 20) * kThreads < (int64_t(1) << 31); }

template <class T, int V, class Index>
int launch_forward(const void* x, int64_t x_stride, void* y, int64_t rows, int64_t n, cudaStream_t stream) {
  const int64_t packs = rows * (n / V);
  return LAUNCH((forward<T, V, Index>), blocks_for(packs), kThreads, 0, stream, static_cast<const T*>(x), x_stride,
                static_cast<T*>(y), Index(packs), Index(n / V), n);
}

template <class T, int V, class Index>
int launch_backward(const void* grad, int64_t grad_stride, const void* x, int64_t x_stride, void* grad_x, int64_t rows, int64_t n,
                    cudaStream_t stream) {
  const int64_t packs = rows * (n / V);
  return LAUNCH((backward<T, V, Index>), blocks_for(packs), kThreads, 0, stream, static_cast<const T*>(grad), grad_stride,
                static_cast<const T*>(x), x_stride, static_cast<T*>(grad_x), Index(packs), Index(n / V), n);
}

template <class T>
int forward_of(const void* x, int64_t x_stride, void* y, int64_t rows, int64_t n, cudaStream_t stream) {
  constexpr int V = kPack<T>;
  const bool packed = n % V == 0 && x_stride % V == 0 && aligned(x) && aligned(y);
  const bool narrow_index = fits_32_bits(rows * (packed ? n / V : n));
  if (packed && narrow_index) return launch_forward<T, V, int32_t>(x, x_stride, y, rows, n, stream);
  if (packed) return launch_forward<T, V, int64_t>(x, x_stride, y, rows, n, stream);
  if (narrow_index) return launch_forward<T, 1, int32_t>(x, x_stride, y, rows, n, stream);
  return launch_forward<T, 1, int64_t>(x, x_stride, y, rows, n, stream);
}

template <class T>
int backward_of(const void* grad, int64_t grad_stride, const void* x, int64_t x_stride, void* grad_x, int64_t rows, int64_t n,
                cudaStream_t stream) {
  constexpr int V = kPack<T>;
  const bool packed =
      n % V == 0 && x_stride % V == 0 && grad_stride % V == 0 && aligned(x) && aligned(grad) && aligned(grad_x);
  const bool narrow_index = fits_32_bits(rows * (packed ? n / V : n));
  if (packed && narrow_index) return launch_backward<T, V, int32_t>(grad, grad_stride, x, x_stride, grad_x, rows, n, stream);
  if (packed) return launch_backward<T, V, int64_t>(grad, grad_stride, x, x_stride, grad_x, rows, n, stream);
  if (narrow_index) return launch_backward<T, 1, int32_t>(grad, grad_stride, x, x_stride, grad_x, rows, n, stream);
  return launch_backward<T, 1, int64_t>(grad, grad_stride, x, x_stride, grad_x, rows, n, stream);
}

}  // namespace

int geglu_forward_cuda(Dtype dtype, const void* x, int64_t x_stride, void* y, int64_t rows, int64_t n, void* stream_pointer) {
  if (rows == 0 || n == 0) return cudaSuccess;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  switch (dtype) {
    case Dtype::f32: return forward_of<float>(x, x_stride, y, rows, n, stream);
    case Dtype::f64: return forward_of<double>(x, x_stride, y, rows, n, stream);
    case Dtype::f16: return forward_of<__half>(x, x_stride, y, rows, n, stream);
    case Dtype::bf16: return forward_of<__nv_bfloat16>(x, x_stride, y, rows, n, stream);
  }
  return cudaErrorInvalidValue;
}

int geglu_backward_cuda(Dtype dtype, const void* grad, int64_t grad_stride, const void* x, int64_t x_stride, void* grad_x,
                        int64_t rows, int64_t n, void* stream_pointer) {
  if (rows == 0 || n == 0) return cudaSuccess;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  switch (dtype) {
    case Dtype::f32: return backward_of<float>(grad, grad_stride, x, x_stride, grad_x, rows, n, stream);
    case Dtype::f64: return backward_of<double>(grad, grad_stride, x, x_stride, grad_x, rows, n, stream);
    case Dtype::f16: return backward_of<__half>(grad, grad_stride, x, x_stride, grad_x, rows, n, stream);
    case Dtype::bf16: return backward_of<__nv_bfloat16>(grad, grad_stride, x, x_stride, grad_x, rows, n, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace ldmkit
