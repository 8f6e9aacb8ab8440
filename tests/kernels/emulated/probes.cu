// Small kernels, each of which shows one thing that the emulated GPU does. tests/kernels/test_emulation.py has the expected
// values.
#include <cooperative_groups.h>

#include "common.cuh"

namespace cg = cooperative_groups;
using namespace ldmkit;

#define PROBE extern "C" __attribute__((visibility("default"))) int

namespace {

// out[i][thread]: what shuffle, vote and reduction i gives.
__global__ void warp_functions(int* out) {
  const unsigned thread = threadIdx.x, lane = thread % 32;
  const int value = static_cast<int>(thread * thread % 101);
  int row = 0;
  const auto put = [&](int result) { out[row++ * static_cast<int>(blockDim.x) + static_cast<int>(thread)] = result; };
  put(__shfl_sync(~0u, value, 3));
  put(__shfl_sync(~0u, value, static_cast<int>(lane + 1), 8));
  put(__shfl_xor_sync(~0u, value, 5));
  put(__shfl_down_sync(~0u, value, 3));
  put(__shfl_up_sync(~0u, value, 3, 16));
  put(static_cast<int>(__ballot_sync(~0u, value % 3 == 0)));
  put(__any_sync(~0u, value > 97));
  put(__all_sync(~0u, value < 100));
  put(__reduce_add_sync(~0u, value));
  put(__reduce_max_sync(~0u, value));
  put(static_cast<int>(__reduce_xor_sync(~0u, static_cast<unsigned>(value))));
  if (lane % 2 == 0) {  // half a warp, by its mask
    put(__reduce_add_sync(0x55555555u, value));
  } else {
    put(-1);
  }
  const auto tile = cg::tiled_partition<8>(cg::this_thread_block());
  put(tile.shfl_down(value, 2));
  put(static_cast<int>(tile.ballot(value % 3 == 0)));
  put(__syncthreads_count(value > 50));
}

// A block sums its numbers by halves in shared memory, the last of the blocks sums their sums.
__global__ void sum_all(const int* numbers, int* partial, unsigned* finished, int* total, bool fenced) {
  SHARED(int, sums, [128]);
  SHARED(bool, last, [1]);
  sums[threadIdx.x] = numbers[blockIdx.x * 128 + threadIdx.x];
  __syncthreads();
  for (unsigned half = 64; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sums[0];
    if (fenced) __threadfence();
    last[0] = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last[0] || threadIdx.x != 0) return;
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
  *total = sum;
}

// d (16, 8) += a b, fragments in and out as a lane holds them: a (32, 4), b (32, 2), d (32, 4).
template <class T>
__global__ void multiply_fragments(const uint32_t* a, const uint32_t* b, float* d) {
  uint32_t a_4[4], b_2[2];
  float d_4[4];
  for (int i = 0; i < 4; ++i) a_4[i] = a[4 * threadIdx.x + i];
  for (int i = 0; i < 2; ++i) b_2[i] = b[2 * threadIdx.x + i];
  for (int i = 0; i < 4; ++i) d_4[i] = d[4 * threadIdx.x + i];
  if constexpr (std::is_same<T, float>::value) {
    mma_m16n8k8_tf32(d_4, a_4, b_2);
  } else {
    mma_m16n8k16<T>(d_4, a_4, b_2);
  }
  for (int i = 0; i < 4; ++i) d[4 * threadIdx.x + i] = d_4[i];
}

// out (4, 32, 4): the fragments of ldmatrix x4, x4 transposed, x2, x2 transposed, of the (32, 8) 16-bit elements of `rows`.
__global__ void load_fragments(const uint16_t* rows, uint32_t* out) {
  SHARED(uint16_t, tile, [32][8]);
  for (int i = 0; i < 8; ++i) tile[threadIdx.x][i] = rows[8 * threadIdx.x + i];
  __syncwarp();
  uint32_t r[4][4] = {};
  ldmatrix_x4(r[0], tile[threadIdx.x]);
  ldmatrix_x4_trans(r[1], tile[threadIdx.x]);
  uint32_t pair[2];
  ldmatrix_x2(pair, tile[threadIdx.x % 16]);
  r[2][0] = pair[0], r[2][1] = pair[1];
  ldmatrix_x2_trans(pair, tile[threadIdx.x % 16]);
  r[3][0] = pair[0], r[3][1] = pair[1];
  for (int k = 0; k < 4; ++k)
    for (int i = 0; i < 4; ++i) out[(k * 32 + threadIdx.x) * 4 + i] = r[k][i];
}

// out[k] is what shared memory holds of `from` after cp.async and what `waits` says; lanes from `valid` on ask for zeros.
__global__ void copy_groups(const float* from, float* out, int valid, int waits) {
  DYNAMIC_SHARED(memory);
  auto* tile = reinterpret_cast<float*>(memory);
  const int lane = static_cast<int>(threadIdx.x);
  cp_async<16>(tile + 4 * lane, from + 4 * lane, lane < valid);
  cp_async_commit();
  cp_async<8>(tile + 128 + 2 * lane, from + 2 * lane, lane < valid);
  cp_async_commit();
  cp_async<4>(tile + 192 + lane, from + lane, lane < valid);
  if (waits == 1) cp_async_wait<1>();
  if (waits == 2) cp_async_wait<0>();  // the last copy is in no group yet
  if (waits == 3) {
    cp_async_commit();
    cp_async_wait<0>();
  }
  __syncthreads();
  for (int i = lane; i < 224; i += 32) out[i] = tile[i];
}

// Every block finds its shared memory full of 0xff.
__global__ void read_unwritten(unsigned* out) {
  DYNAMIC_SHARED(memory);
  SHARED(unsigned, fixed, [32]);
  auto* dynamic = reinterpret_cast<unsigned*>(memory);
  out[64 * blockIdx.x + threadIdx.x] = fixed[threadIdx.x];
  out[64 * blockIdx.x + 32 + threadIdx.x] = dynamic[threadIdx.x];
  fixed[threadIdx.x] = dynamic[threadIdx.x] = threadIdx.x;
}

// order[i] is the block that ran i-th and, after those, the thread.
__global__ void run_order(int* order, int* next) {
  const int at = atomicAdd(next, 1);
  order[at] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

// One mistake each, by number; `x` has 64 numbers, `y` is as large and may be written.
__global__ void mistake(int which, const float* x, float* y, const float* elsewhere) {
  SHARED(float, tile, [64]);
  const int i = static_cast<int>(threadIdx.x);
  if (which != 14) tile[i] = x[i];
  switch (which) {
    case 0: y[i] = tile[63 - i]; return;  // no barrier
    case 1:  // a barrier for half of the threads, of which the others know nothing
      if (i < 32) __syncthreads();
      return;
    case 2:  // two barriers that are not the same
      if (i < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      return;
    case 3: y[i] = x[i + 1]; return;
    case 4: y[i - 1] = 0; return;
    case 5: const_cast<float*>(x)[i] = 0; return;
    case 6: {  // past the end, for the last
      const float* neighbour = tile + 1;
      __syncthreads();
      y[i] = neighbour[i];
      return;
    }
    case 7: y[i] = reinterpret_cast<const float4*>(x + 1)->x; return;
    case 8: y[0] = x[i]; return;  // all of them
    case 9:  // half of the lanes that the mask names
      if (i % 2 == 0) y[i] = __shfl_xor_sync(~0u, x[i], 2);
      return;
    case 10: y[i] = __shfl_xor_sync(1u, x[i], 2); return;  // most callers are not in the mask
    case 11:  // lanes wait for one another, each somewhere else
      if (i % 2 == 0) {
        __syncwarp();
      } else {
        __syncthreads();
      }
      return;
    case 12: {
      uint32_t r[2];
      ldmatrix_x2(r, x);  // not shared
      y[i] = static_cast<float>(r[0]);
      return;
    }
    case 13: {
      int sum = 0x7fffffff;
      sum += static_cast<int>(threadIdx.x);
      y[i] = static_cast<float>(sum);
      return;
    }
    case 14: cp_async<16>(tile + 1, x); return;  // not aligned
    case 15: {
      const int local[4] = {1, 2, 3, 4};
      y[i] = static_cast<float>(local[i / 8]);
      return;
    }
    case 16: y[i] = *elsewhere; return;  // the host's memory
    case 17:  // a shuffle does not order memory
      tile[i] = __shfl_xor_sync(~0u, x[i], 1);
      y[i] = tile[i ^ 1];
      return;
    case 18:  // a destination that others still read
      y[i] = tile[i ^ 32];
      cp_async<4>(tile + i, x + i);
      return;
    case 19: y[i] = atomicAdd(reinterpret_cast<int*>(y) + 64, 1); return;
    default: y[i] = tile[i];
  }
}

__global__ void formats(const float* x, uint32_t* half, uint32_t* bfloat16, uint32_t* tf32, float* exp2, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    half[i] = pack_registers<__half>(x[i], 1.0f);
    bfloat16[i] = pack_registers<__nv_bfloat16>(x[i], 1.0f);
    tf32[i] = to_tf32(x[i]);
    exp2[i] = fast_exp2(x[i]);
  }
}

// As many switches as there are calls: a shuffle for each.
__global__ void shuffle_often(int* out, int calls) {
  int value = static_cast<int>(threadIdx.x);
  for (int i = 0; i < calls; ++i) value = __shfl_xor_sync(~0u, value, 1);
  out[threadIdx.x] = value;
}

}  // namespace

PROBE probe_warp_functions(int* out) { return LAUNCH(warp_functions, 1, 64, 0, nullptr, out); }
PROBE probe_sum_all(const int* numbers, int* partial, unsigned* finished, int* total, int blocks, bool fenced) {
  return LAUNCH(sum_all, static_cast<unsigned>(blocks), 128, 0, nullptr, numbers, partial, finished, total, fenced);
}
PROBE probe_multiply(int kind, const uint32_t* a, const uint32_t* b, float* d) {
  if (kind == 0) return LAUNCH((multiply_fragments<__half>), 1, 32, 0, nullptr, a, b, d);
  if (kind == 1) return LAUNCH((multiply_fragments<__nv_bfloat16>), 1, 32, 0, nullptr, a, b, d);
  return LAUNCH((multiply_fragments<float>), 1, 32, 0, nullptr, a, b, d);
}
PROBE probe_load_fragments(const uint16_t* rows, uint32_t* out) { return LAUNCH(load_fragments, 1, 32, 0, nullptr, rows, out); }
PROBE probe_copy_groups(const float* from, float* out, int valid, int waits) {
  return LAUNCH(copy_groups, 1, 32, 224 * 4, nullptr, from, out, valid, waits);
}
PROBE probe_read_unwritten(unsigned* out) { return LAUNCH(read_unwritten, 3, 32, 128, nullptr, out); }
PROBE probe_run_order(int* order, int* next) { return LAUNCH(run_order, 5, 64, 0, nullptr, order, next); }
PROBE probe_mistake(int which, const float* x, float* y) {
  const float here = 0;
  return LAUNCH(mistake, 1, 64, 0, nullptr, which, x, y, &here);
}
PROBE probe_shuffle_often(int* out, int calls) { return LAUNCH(shuffle_often, 1, 32, 0, nullptr, out, calls); }
PROBE probe_configuration(unsigned grid_y, unsigned threads, size_t shared_bytes, int* out) {
  return LAUNCH(shuffle_often, dim3(1, grid_y), threads, shared_bytes, nullptr, out, 0);
}
PROBE probe_formats(const float* x, uint32_t* half, uint32_t* bfloat16, uint32_t* tf32, float* exp2, int count) {
  return LAUNCH(formats, 1, 1024, 0, nullptr, x, half, bfloat16, tf32, exp2, count);
}
