// What ldmkit's kernels ask of the hardware beyond plain CUDA C++. Everything here has two bodies: PTX for the GPU (sm_80 and
// later), and one for the host (LDMKIT_EMULATION), where csrc/emulation runs the same .cu, one fiber per thread. Kernels
// therefore use
//   LAUNCH, SHARED and DYNAMIC_SHARED      instead of <<<>>> and __shared__,
//   cp_async*, ldmatrix*, mma*, fast_exp2  instead of inline PTX,
// and plain CUDA for the rest: __syncthreads, shuffles, votes, __reduce_*_sync, integer atomics, __ldg, cooperative_groups.
// Emulated barriers and shuffles are strict: every thread of the block (lane of the mask) must arrive, ended threads included.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "ldmkit's CUDA kernels need compute capability 8.0 or later: set TORCH_CUDA_ARCH_LIST accordingly"
#endif

// LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...) => int, a cudaError_t. Does not wait (the emulation does).
// A template's commas are fine: LAUNCH((kernel<T, 8>), ...).
// SHARED(type, name, dims); declares static shared memory, 16-byte aligned: SHARED(float, tile, [32][33]);
// DYNAMIC_SHARED(name); declares unsigned char* name, the block's dynamic shared memory, 16-byte aligned.
#ifdef LDMKIT_EMULATION

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::ldmkit::emulation::launch(#kernel, grid, block, shared_bytes, stream, kernel, __VA_ARGS__)
#define SHARED(type, name, dims)                                                           \
  static ::ldmkit::emulation::SharedVariable name##_variable(sizeof(::ldmkit::emulation::Identity<type dims>)); \
  auto& name = *static_cast<::ldmkit::emulation::Identity<type dims>*>(name##_variable.data())
#define DYNAMIC_SHARED(name) unsigned char* name = ::ldmkit::emulation::dynamic_shared()

#else

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::ldmkit::launch(grid, block, shared_bytes, stream, kernel, __VA_ARGS__)
#define SHARED(type, name, dims) __shared__ alignas(16) type name dims
#define DYNAMIC_SHARED(name)                                              \
  extern __shared__ __align__(16) unsigned char ldmkit_dynamic_shared[]; \
  unsigned char* name = ldmkit_dynamic_shared

namespace ldmkit {

// `cluster` neighbouring blocks (in x) run at a time and can meet; 1 is any device's.
template <class... Parameters, class... Arguments>
int launch_cluster(dim3 grid, dim3 block, int cluster, size_t shared_bytes, cudaStream_t stream, void (*kernel)(Parameters...),
                   Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {  // what a kernel gets unasked
    const int code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes));
    if (code != cudaSuccess) return code;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <class... Parameters, class... Arguments>
int launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, void (*kernel)(Parameters...),
           Arguments... arguments) {
  return launch_cluster(grid, block, 1, shared_bytes, stream, kernel, arguments...);
}

}  // namespace ldmkit

#endif

namespace ldmkit {

// fp16 and bf16 compute in fp32 and round once; fp64 stays fp64.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// To nearest, ties to even.
template <class T>
__device__ inline T narrow(typename Compute<T>::type value) {
  return value;
}
template <>
__device__ inline __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// V neighbours that travel together; one access where sizeof(T) * V is 2, 4, 8 or 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

// Two 16-bit values in a register as mma and ldmatrix have them: `low` is the one with the lower index.
template <class T>
__device__ inline uint32_t pack_registers(float low, float high);
template <>
__device__ inline uint32_t pack_registers<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t pack_registers<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// 2^x within 2 ulp; subnormal results are flushed to zero on the GPU.
__device__ inline float fast_exp2(float x) {
#ifdef LDMKIT_EMULATION
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// fp32 rounded to tf32 (10 bits of mantissa; to nearest, ties away from zero), as mma_m16n8k8_tf32 takes it.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t bits;
#ifdef LDMKIT_EMULATION
  bits = emulation::to_tf32(x);
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#endif
  return bits;
}

// Asynchronous copy of N = 4, 8 or 16 bytes, both addresses aligned to N; zeros, and `global` is not read, where !valid.
template <int N>
__device__ inline void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(N == 4 || N == 8 || N == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef LDMKIT_EMULATION
  emulation::cp_async(shared, global, N, valid);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? N : 0;
  if constexpr (N == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(N), "r"(bytes) : "memory");
  }
#endif
}

// Closes this thread's group of copies.
__device__ inline void cp_async_commit() {
#ifdef LDMKIT_EMULATION
  emulation::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the last N of this thread's groups are under way. Other threads see the data after a barrier.
template <int N>
__device__ inline void cp_async_wait() {
#ifdef LDMKIT_EMULATION
  emulation::cp_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// The blocks of a cluster meet (launch_cluster, sm_90 and later); what they wrote before, to global memory too, is seen after.
__device__ inline void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// ldmatrix: 8 x 8 matrices of 16-bit elements from shared memory. Lane 8 i + j names row j of matrix i, 16 bytes, 16-byte
// aligned; r[i] of lane l gets elements (l / 4, 2 (l % 4) + {0, 1}) of matrix i, of its transpose with _trans. x2 reads the
// rows of lanes 0..15.
#ifdef LDMKIT_EMULATION
#define LDMKIT_LDMATRIX(name, count, trans)                               \
  __device__ inline void name(uint32_t (&r)[count], const void* row) {    \
    emulation::ldmatrix(r, row, count, trans);                            \
  }
LDMKIT_LDMATRIX(ldmatrix_x2, 2, false)
LDMKIT_LDMATRIX(ldmatrix_x2_trans, 2, true)
LDMKIT_LDMATRIX(ldmatrix_x4, 4, false)
LDMKIT_LDMATRIX(ldmatrix_x4_trans, 4, true)
#undef LDMKIT_LDMATRIX
#else
#define LDMKIT_LDMATRIX_X2(name, trans)                                              \
  __device__ inline void name(uint32_t (&r)[2], const void* row) {                   \
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));      \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 {%0, %1}, [%2];" \
                 : "=r"(r[0]), "=r"(r[1])                                            \
                 : "r"(from)                                                         \
                 : "memory");                                                        \
  }
#define LDMKIT_LDMATRIX_X4(name, trans)                                                              \
  __device__ inline void name(uint32_t (&r)[4], const void* row) {                                   \
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));                      \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0, %1, %2, %3}, [%4];"         \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                    \
                 : "r"(from)                                                                         \
                 : "memory");                                                                        \
  }
LDMKIT_LDMATRIX_X2(ldmatrix_x2, "")
LDMKIT_LDMATRIX_X2(ldmatrix_x2_trans, ".trans")
LDMKIT_LDMATRIX_X4(ldmatrix_x4, "")
LDMKIT_LDMATRIX_X4(ldmatrix_x4_trans, ".trans")
#undef LDMKIT_LDMATRIX_X2
#undef LDMKIT_LDMATRIX_X4
#endif

// d += a b for a warp: a is 16 x 16, b is 16 x 8, both T = __half or __nv_bfloat16; d is 16 x 8 in fp32. With g = lane / 4,
// t = lane % 4 (PTX ISA, "Matrix fragments for mma.m16n8k16"):
//   a[0], a[1]: rows g, g + 8, columns 2t + {0, 1};  a[2], a[3]: the same rows, columns 2t + 8 + {0, 1}
//   b[0], b[1]: rows 2t + {0, 1}, 2t + 8 + {0, 1}, column g
//   d[0..1]: row g, columns 2t + {0, 1};  d[2..3]: row g + 8
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr bool is_half = std::is_same<T, __half>::value;
  static_assert(is_half || std::is_same<T, __nv_bfloat16>::value, "mma_m16n8k16 takes __half or __nv_bfloat16");
#ifdef LDMKIT_EMULATION
  emulation::mma_m16n8k16(d, a, b, is_half);
#else
  if constexpr (is_half) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// The same with a 16 x 8, b 8 x 8, both tf32 (the low 13 bits of a register are ignored): a[0..3] are (g, t), (g + 8, t),
// (g, t + 4), (g + 8, t + 4); b[0..1] are (t, g), (t + 4, g).
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef LDMKIT_EMULATION
  emulation::mma_m16n8k8_tf32(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace ldmkit
