// What every attention kernel is told: tensors, sizes, scale and mask; and how a block finds its head.
#pragma once

#include "common.cuh"
#include "cross_attention_device.h"

namespace ldmkit::attention {

// Rows of all heads: element (b, h, row, column) is at data[b batch + h head + row stride + column].
template <class T>
struct Rows {
  T* data;
  int64_t batch, head, stride;

  __device__ T* of(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// One call. D is the width of rows in memory, a multiple of 8; from `width` on, columns are zeros.
template <class T>
struct Call {
  using A = typename Compute<T>::type;

  int heads, queries, keys, width, D;
  A scale;
  Rows<const T> q, k, v;
  const void* mask;  // null, or bytes (true = attend), or numbers to add
  bool additive;
  int64_t mask_batch, mask_head, mask_row;
  const uint8_t* hidden;  // keys that every query of a head has masked
  int64_t hidden_batch, hidden_head;

  // Scores are compared unscaled where that is their order, which saves a multiplication each.
  __device__ bool scaled_first() const { return mask != nullptr || !(scale > 0); }
};

// What the gradient reads besides the call, and what it writes.
template <class T>
struct Gradient {
  using A = typename Compute<T>::type;

  Rows<const T> grad, out;
  const A *lse, *grad_lse;  // grad_lse may be null
  A* delta;
  T *dq, *dk, *dv;
  A *dk_parts, *dv_parts;  // of all chunks of queries; null where there is one chunk
};

// One head of a call.
template <class T>
struct Head {
  using A = typename Compute<T>::type;

  int b, h, index;  // index counts the heads of all images
  const T *q, *k, *v;
  const uint8_t* hidden;
  const uint8_t* shown;
  const T* added;
  int64_t mask_row;

  __device__ Head(const Call<T>& call, int index) : b(index / call.heads), h(index - b * call.heads), index(index) {
    q = call.q.of(b, h), k = call.k.of(b, h), v = call.v.of(b, h);
    const int64_t at = b * call.mask_batch + h * call.mask_head;
    hidden = call.hidden == nullptr ? nullptr : call.hidden + b * call.hidden_batch + h * call.hidden_head;
    shown = call.mask == nullptr || call.additive ? nullptr : static_cast<const uint8_t*>(call.mask) + at;
    added = call.mask == nullptr || !call.additive ? nullptr : static_cast<const T*>(call.mask) + at;
    mask_row = call.mask_row;
  }

  // A key that nobody attends to may hold NaN: it is read as zeros.
  __device__ bool readable(int key) const { return hidden == nullptr || hidden[key] == 0; }

  // What is added to the scaled score of a query and a key; -inf hides the key.
  __device__ A bias(int query, int key) const {
    if (shown != nullptr) return shown[query * mask_row + key] != 0 ? A(0) : -A(INFINITY);
    return added != nullptr ? widen(added[query * mask_row + key]) : A(0);
  }
};

// A scaled score with its bias, which alone counts where it hides the key: the score may be NaN there.
template <class A>
__device__ inline A masked(A score, A bias) {
  return bias == -A(INFINITY) ? bias : score + bias;
}

}  // namespace ldmkit::attention
