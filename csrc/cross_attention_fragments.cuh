// Matrices in registers and shared memory as mma_m16n8k16 takes them. With g = lane / 4 and t = lane % 4, a thread holds rows g
// and g + 8 of a 16-row tile.
//
// Columns of D may be contracted in any order, if it is the same for both factors. In pieces: of 32 neighbouring columns,
// thread t holds the eight from 8t on, of the last 16 (where D ends in 8 or 16) the four from 4t on. So queries travel from
// memory to the tensor cores 16 bytes at a time, without shared memory, at D = 40 too. In the order of the matrix, as ldmatrix
// has it: 8j + 2t and the next for register j. Rows that are contracted over columns and over themselves are read by ldmatrix
// both times.
#pragma once

#include "cross_attention_call.cuh"

namespace ldmkit::attention {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % 32; }

template <int D>
struct Columns {
  static_assert(D % 8 == 0, "columns come in eights");
  static constexpr int kTail = D % 32 == 8 || D % 32 == 16;  // 16 columns at the end
  static constexpr int kWhole = (D - 16 * kTail + 31) / 32;  // times 32 columns
  static constexpr int kContracted = 32 * kWhole + 16 * kTail;

  // Elements from row to row in shared memory. Where a thread reads 16 bytes of a row, two rows meet all banks:
  static constexpr int kPiecesPitch = (kContracted + 31) / 64 * 64 + 32;
  // For ldmatrix, eight rows do:
  static constexpr int kMatrixPitch = (kContracted + 7) / 16 * 16 + 8;
  static constexpr int kMatrixPitchUncontracted = (D + 7) / 16 * 16 + 8;
};

using Words2 = Pack<uint32_t, 2>;
using Words4 = Pack<uint32_t, 4>;

// `count` rows from `begin` on into shared memory, asynchronously: zeros from row `end` on, for unreadable rows, and from
// column `width` up to COLUMNS.
template <class T, int COLUMNS, int PITCH, int THREADS, class Readable>
__device__ void copy_rows(T* shared, const T* rows, int64_t stride, int begin, int count, int end, int width,
                          const Readable& readable) {
  constexpr int kPieces = COLUMNS / 8;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count * kPieces; i += THREADS) {
    const int row = i / kPieces, column = i % kPieces * 8;
    const bool valid = begin + row < end && column < width && readable(begin + row);
    cp_async<16>(shared + row * PITCH + column, rows + (begin + row) * stride + column, valid);
  }
}

enum class Order { pieces, matrix };

// One row of a 16-row tile as the left factor of products over D: `whole[c]` for columns 32c.., then `tail`.
template <class T, int D>
struct RowWords {
  Words4 whole[Columns<D>::kWhole > 0 ? Columns<D>::kWhole : 1];
  Words2 tail;

  template <Order ORDER>
  __device__ void load(const T* row, int width, bool valid) {
    const int t = lane() % 4;
#pragma unroll
    for (int c = 0; c < Columns<D>::kWhole; ++c) load_words<ORDER>(whole[c], row, 32 * c, width, valid, t);
    if constexpr (Columns<D>::kTail) load_words<ORDER>(tail, row, 32 * Columns<D>::kWhole, width, valid, t);
  }

 private:
  template <Order ORDER, int N>
  __device__ static void load_words(Pack<uint32_t, N>& words, const T* row, int column, int width, bool valid, int t) {
    if constexpr (ORDER == Order::pieces) {
      column += 2 * N * t;
      words = valid && column < width ? *reinterpret_cast<const Pack<uint32_t, N>*>(row + column) : Pack<uint32_t, N>{};
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int at = column + 8 * j + 2 * t;
        words.at[j] = valid && at < width ? *reinterpret_cast<const uint32_t*>(row + at) : 0u;
      }
    }
  }
};

// Rows g and g + 8.
template <class T, int D>
struct LeftTile {
  RowWords<T, D> upper, lower;

  template <Order ORDER>
  __device__ void load(const T* rows, int64_t stride, int begin, int end, int width) {
    const int row = begin + lane() / 4;
    const bool valid[2] = {row < end, row + 8 < end};
    load_rows<ORDER>(rows, stride, begin, valid, width);
  }

  // Zeros where a row is not valid.
  template <Order ORDER>
  __device__ void load_rows(const T* rows, int64_t stride, int begin, const bool (&valid)[2], int width) {
    const T* row = rows + (begin + lane() / 4) * stride;
    upper.template load<ORDER>(row, width, valid[0]);
    lower.template load<ORDER>(row + 8 * stride, width, valid[1]);
  }
};

// d += left right^T, times 32 or 16 columns, from the words a thread holds of its rows.
template <class T, int N>
__device__ void multiply_words(float (&d)[4], const Pack<uint32_t, N>& upper, const Pack<uint32_t, N>& lower,
                               const uint32_t (&right)[N]) {
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    mma_m16n8k16<T>(d, {upper.at[j], lower.at[j], upper.at[j + 1], lower.at[j + 1]}, {right[j], right[j + 1]});
  }
}

// A row's words of the eight rows in shared memory that the right factor has, from column 32c (or of the tail) on.
template <Order ORDER, class T>
__device__ void read_right(uint32_t (&words)[4], const T* rows, int pitch, int column) {
  const int l = lane();
  if constexpr (ORDER == Order::pieces) {
    const Words4 b = *reinterpret_cast<const Words4*>(rows + l / 4 * pitch + column + l % 4 * 8);
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = b.at[j];
  } else {
    ldmatrix_x4(words, rows + l % 8 * pitch + column + l / 8 * 8);
  }
}
template <Order ORDER, class T>
__device__ void read_right(uint32_t (&words)[2], const T* rows, int pitch, int column) {
  const int l = lane();
  if constexpr (ORDER == Order::pieces) {
    const Words2 b = *reinterpret_cast<const Words2*>(rows + l / 4 * pitch + column + l % 4 * 4);
    words[0] = b.at[0], words[1] = b.at[1];
  } else {
    ldmatrix_x2(words, rows + l % 8 * pitch + column + l / 8 % 2 * 8);
  }
}

// d[m] += left[m] right^T for the eight rows of `right`, PITCH apart in shared memory.
template <Order ORDER, class T, int D, int PITCH, int M>
__device__ void multiply_rows(float (&d)[M][4], const LeftTile<T, D> (&left)[M], const T* right) {
#pragma unroll
  for (int c = 0; c < Columns<D>::kWhole; ++c) {
    uint32_t words[4];
    read_right<ORDER>(words, right, PITCH, 32 * c);
#pragma unroll
    for (int m = 0; m < M; ++m) multiply_words<T>(d[m], left[m].upper.whole[c], left[m].lower.whole[c], words);
  }
  if constexpr (Columns<D>::kTail) {
    uint32_t words[2];
    read_right<ORDER>(words, right, PITCH, 32 * Columns<D>::kWhole);
#pragma unroll
    for (int m = 0; m < M; ++m) multiply_words<T>(d[m], left[m].upper.tail, left[m].lower.tail, words);
  }
}

// Two neighbouring result tiles (16 columns) as the left factor of a product over those columns.
template <class T>
__device__ void as_left(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack_registers<T>(left[0], left[1]);
  a[1] = pack_registers<T>(left[2], left[3]);
  a[2] = pack_registers<T>(right[0], right[1]);
  a[3] = pack_registers<T>(right[2], right[3]);
}

// out[m] += a[m] right for the 16 rows of `right`, PITCH apart in shared memory, 8 TILES columns of it.
template <class T, int PITCH, int M, int TILES>
__device__ void multiply_columns(float (&out)[M][TILES][4], const uint32_t (&a)[M][4], const T* right) {
  const T* row = right + lane() % 16 * PITCH;
#pragma unroll
  for (int n = 0; n + 1 < TILES; n += 2) {
    uint32_t b[4];
    ldmatrix_x4_trans(b, row + 8 * n + lane() / 16 * 8);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      mma_m16n8k16<T>(out[m][n], a[m], {b[0], b[1]});
      mma_m16n8k16<T>(out[m][n + 1], a[m], {b[2], b[3]});
    }
  }
  if constexpr (TILES % 2 == 1) {
    uint32_t b[2];
    ldmatrix_x2_trans(b, row + 8 * (TILES - 1));
#pragma unroll
    for (int m = 0; m < M; ++m) mma_m16n8k16<T>(out[m][TILES - 1], a[m], b);
  }
}

// The four threads of a quad hold word j of each other's row j: thread t gives word j to thread j, as its word t.
__device__ inline void transpose_quad(uint32_t (&w)[4]) {
  const int t = lane() % 4;
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if (low & step) continue;
      const bool odd = t & step;
      const uint32_t got = __shfl_xor_sync(kAllLanes, odd ? w[low] : w[low | step], step);
      if (odd) {
        w[low] = got;
      } else {
        w[low | step] = got;
      }
    }
  }
}

// Stores rows g and g + 8 of a result, times `factor` each, 8 TILES columns; `width` of them exist. Whole packs where width % 8
// is 0.
template <class T, int TILES>
__device__ void store_tile(T* upper, T* lower, bool has_upper, bool has_lower, int width, const float (&d)[TILES][4],
                           const float (&factor)[2]) {
  const int t = lane() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* row = half == 0 ? upper : lower;
    const bool valid = half == 0 ? has_upper : has_lower;
    const auto word = [&](int n) {
      return pack_registers<T>(d[n][2 * half] * factor[half], d[n][2 * half + 1] * factor[half]);
    };
    if (width % 8 == 0) {
#pragma unroll
      for (int n = 0; n + 3 < TILES; n += 4) {
        uint32_t w[4] = {word(n), word(n + 1), word(n + 2), word(n + 3)};
        transpose_quad(w);
        if (valid && 8 * (n + t) < width) *reinterpret_cast<Words4*>(row + 8 * (n + t)) = Words4{{w[0], w[1], w[2], w[3]}};
      }
#pragma unroll
      for (int n = TILES / 4 * 4; n < TILES; ++n) {
        if (valid && 8 * n < width) *reinterpret_cast<uint32_t*>(row + 8 * n + 2 * t) = word(n);
      }
    } else if (valid) {
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * n + 2 * t + i;
          if (column < width) row[column] = narrow<T>(d[n][2 * half + i] * factor[half]);
        }
      }
    }
  }
}

// Maximum and sum over the four threads that share a row.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

}  // namespace ldmkit::attention
