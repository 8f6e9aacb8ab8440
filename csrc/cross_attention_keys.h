// Where tensors' rows are, and the keys of one head, as its mask leaves them.
#pragma once

#include <type_traits>

#include "cross_attention.h"
#include "cross_attention_pack.h"
#include "cross_attention_softmax.h"

namespace ldmkit::attention {
namespace {

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

template <class Void>
LDMKIT_INLINE auto* row_of(const HeadRows<Void>& rows, Dtype dtype, int64_t b, int64_t h, int64_t row) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  return static_cast<Byte*>(rows.data) + (b * rows.batch + h * rows.head + row * rows.row) * size_of(dtype);
}

// One caller's scratch memory, dealt out in order; from null, it counts.
struct Scratch {
  char* next;

  template <class T>
  T* take(int64_t count) {
    char* taken = next;
    next += round_up(count * int64_t(sizeof(T)), 64);
    return reinterpret_cast<T*>(taken);
  }
};

// A mask that says the same to all queries is settled here, once per head: hidden keys are left out, and numbers become one
// bias. With any other mask, all keys stay, and those that no query may attend to (they may hold NaN) are read as zeros.
struct Keys {
  int64_t count;
  int32_t* index;    // of each key in its tensor; -1 is zeros
  float* bias;       // of each key, or null
  const char* rows;  // of the head's mask, where rows differ, or null
};

inline float number(Dtype dtype, const void* data, int64_t i) {
  switch (dtype) {
    case Dtype::f32: return static_cast<const float*>(data)[i];
    case Dtype::bf16: return bit_cast<float>(uint32_t(static_cast<const BFloat16*>(data)[i].bits) << 16);
    case Dtype::f16: {
      const Half padded[4] = {static_cast<const Half*>(data)[i]};
      return load<4>(padded)[0];
    }
    case Dtype::f64: break;
  }
  return 0.0f;
}

inline Keys settle_keys(const AttentionInputs& in, int64_t b, int64_t h, int32_t* index, float* bias) {
  const AttentionMask& mask = in.mask;
  if (mask.data == nullptr) {
    for (int64_t s = 0; s < in.keys; ++s) index[s] = int32_t(s);
    return {in.keys, index, nullptr, nullptr};
  }
  const bool* hidden = mask.hidden + b * mask.hidden_batch + h * mask.hidden_head;
  const int64_t size = mask.additive ? size_of(in.dtype) : 1;
  const char* data = static_cast<const char*>(mask.data) + (b * mask.batch + h * mask.head) * size;
  if (mask.row != 0) {
    for (int64_t s = 0; s < in.keys; ++s) index[s] = hidden[s] ? -1 : int32_t(s);
    return {in.keys, index, nullptr, data};
  }
  int64_t count = 0;
  for (int64_t s = 0; s < in.keys; ++s) {
    if (hidden[s]) continue;
    if (mask.additive) bias[count] = number(in.dtype, data, s);
    index[count++] = int32_t(s);
  }
  return {count, index, mask.additive ? bias : nullptr, nullptr};
}

// W flags, bytes of 0 or 1 => 0 where set, else -inf.
template <int W>
LDMKIT_INLINE Floats<W> bias_of_flags(const char* flags) {
  Bits<W> wide;
  if constexpr (kAvx<W>) {
    typedef uint8_t Bytes __attribute__((vector_size(16)));  // of which W are read
    Bytes narrow = {};
    std::memcpy(&narrow, flags, W);
    asm("vpmovzxbd %1, %0" : "=v"(wide) : "v"(narrow));
  } else {
    for (int i = 0; i < W; ++i) wide[i] = uint8_t(flags[i]);
  }
  return bit_cast<Floats<W>>((wide - 1u) & 0xff800000u);
}

template <int W>
LDMKIT_INLINE void widen_flags(const char* flags, int64_t count, float* bias) {
  int64_t s = 0;
  for (; s + W <= count; s += W) store<W>(bias + s, bias_of_flags<W>(flags + s));
  if (s < count) {
    char rest[W] = {};
    for (int64_t i = s; i < count; ++i) rest[i - s] = flags[i];
    store<W>(bias + s, bias_of_flags<W>(rest));
  }
}

// Row `l` of a mask, keys [begin, begin + count) => what is added to their scores.
template <int W>
LDMKIT_INLINE void widen_mask(const AttentionInputs& in, const char* mask, int64_t l, int64_t begin, int64_t count,
                              float* bias) {
  const int64_t at = l * in.mask.row + begin;
  if (!in.mask.additive) return widen_flags<W>(mask + at, count, bias);
  widen<W>(in.dtype, mask + at * size_of(in.dtype), count, bias, count);
}

// The rows of some keys => staged rows, with zeros up to a whole vector of them.
template <class M>
LDMKIT_INLINE void stage_keys(Dtype dtype, const HeadRows<const void>& rows, int64_t b, int64_t h, int64_t width,
                              const int32_t* index, int64_t count, typename M::Element* to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] < 0) {
      std::memset(to + i * stride, 0, stride * sizeof(*to));
    } else {
      stage_row<M>(dtype, row_of(rows, dtype, b, h, index[i]), width, to + i * stride, stride);
    }
  }
  std::memset(to + count * stride, 0, (round_up(count, M::W) - count) * stride * sizeof(*to));
}

}  // namespace
}  // namespace ldmkit::attention
