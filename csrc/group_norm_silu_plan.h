// How GroupNorm's tensors are cut into parts, and in which order threads work on them.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "group_norm_silu.h"
#include "group_norm_silu_exact.h"
#include "group_norm_silu_loops.h"
#include "large_output.h"

namespace ldmkit::group_norm {

constexpr int64_t kPart = 16384;              // elements,
constexpr int64_t kRowsPart = 65536;          // in rows, where a part has sums for every channel, more of them,
constexpr int64_t kRowsChannels = 512;        // of so many channels
constexpr int64_t kCache = int64_t{1} << 20;  // bytes that a core still finds in its caches in the second pass

constexpr int64_t kGroup = 64;  // elements; in smaller groups, gradients may cancel to nothing in floats

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An item is a group in planes, an image in rows. It is cut into `blocks` of `channels` x `pieces` of `pixels`; the last of
// either has what is left over as well, so none is too small for vectors.
struct Cut {
  int64_t items, item_channels, item_pixels, channels, blocks, pixels, pieces;

  explicit Cut(const GroupNormSilu& call) : item_pixels(call.spatial) {
    if (call.channels_last) {
      items = call.images;
      item_channels = call.channels;
      channels = std::min(item_channels, kRowsChannels);
      pixels = std::clamp<int64_t>(kRowsPart / channels / 16 * 16, 64, kRowsPart);
    } else {
      items = call.images * call.groups;
      item_channels = call.channels / call.groups;
      channels = std::clamp<int64_t>(kPart / item_pixels, 1, item_channels);
      pixels = kPart;
    }
    blocks = item_channels / channels;
    pieces = std::max<int64_t>(1, item_pixels / pixels);
  }

  int64_t parts() const { return blocks * pieces; }
  int64_t elements() const { return item_channels * item_pixels; }
};

// For every item: prepare(item), read(item, part) for all parts, finish(item), write(item, part) for all parts, the last first:
// what was read last is still in the caches. `size` is the bytes read per element. Where items are many and small, each is one
// thread's; else all threads share the parts of a few. With `keep`, read and write have a place for a float per element of the
// item, to hand on what costs more to compute twice; null where the item does not stay in the caches.
template <class Prepare, class Read, class Finish, class Write>
void two_passes(const Threads& threads, const Cut& cut, int64_t size, bool keep, const Prepare& prepare, const Read& read,
                const Finish& finish, const Write& write) {
  const int64_t parts = cut.parts(), grain = up(kPart, cut.elements());
  keep &= cut.elements() * (size + int64_t{sizeof(float)}) <= 2 * kCache;
  const int64_t bytes = cut.elements() * (size + (keep ? int64_t{sizeof(float)} : 0));
  const auto kept = [&](int64_t items) { return std::unique_ptr<float[]>(keep ? new float[items * cut.elements()] : nullptr); };
  if (bytes <= 2 * kCache && cut.items >= 2 * threads.count) {
    threads.run(cut.items, grain, [&](int64_t begin, int64_t end) {
      const auto floats = kept(1);
      for (int64_t item = begin; item < end; ++item) {
        prepare(item);
        for (int64_t i = 0; i < parts; ++i) read(item, i, floats.get());
        finish(item);
        for (int64_t i = parts; i-- > 0;) write(item, i, floats.get());
      }
    });
    return;
  }
  const int64_t wave = std::max<int64_t>(1, threads.count * kCache / bytes);
  const auto floats = kept(std::min(wave, cut.items));
  const auto place = [&](int64_t item) { return keep ? floats.get() + item * cut.elements() : nullptr; };
  for (int64_t first = 0; first < cut.items; first += wave) {
    const int64_t items = std::min(wave, cut.items - first);
    threads.run(items, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) prepare(first + i);
    });
    threads.run(items * parts, up(kPart * parts, cut.elements()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) read(first + i / parts, i % parts, place(i / parts));
    });
    threads.run(items, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) finish(first + i);
    });
    threads.run(items * parts, up(kPart * parts, cut.elements()), [&](int64_t begin, int64_t end) {
      for (int64_t i = end; i-- > begin;) write(first + i / parts, i % parts, place(i / parts));
    });
  }
}

// Where a group begins, in a tensor whose images are `image_stride` apart.
template <class U>
U* group_of(const GroupNormSilu& call, U* tensor, int64_t image_stride, int64_t group) {
  const int64_t channel = group % call.groups * (call.channels / call.groups);
  return tensor ? tensor + group / call.groups * image_stride + channel * (call.channels_last ? 1 : call.spatial) : nullptr;
}

// One group, for float64. weight and bias are by channel; shift is by channel and image, images `shift_stride` apart.
template <class T, class Parameter>
ExactGroup<T, Parameter> exact_group(const GroupNormSilu& call, const Parameter* weight, const Parameter* bias,
                                     const Parameter* shift, int64_t shift_stride, int64_t group) {
  const int64_t channels = call.channels / call.groups, c = group % call.groups * channels;
  return {group_of(call, static_cast<const T*>(call.x), call.x_image, group),
          group_of(call, static_cast<const T*>(call.residual), call.residual_image, group),
          weight ? weight + c : nullptr,
          bias ? bias + c : nullptr,
          shift ? shift + group / call.groups * shift_stride + c : nullptr,
          channels,
          call.spatial,
          call.channels_last ? 1 : call.spatial,
          call.channels_last ? call.channels : 1,
          call.silu};
}

// By channel: parameters, of which shift may be null, and Coefficients to be written.
struct Channels {
  const float *weight, *bias, *shift;
  float *k_offset, *k_scale, *k_bias, *k_slope, *k_constant;

  Coefficients coefficients() const { return {k_offset, k_scale, k_bias, k_slope, k_constant}; }
  double exact_offset(int64_t c, double mean) const { return (shift ? shift[c] : 0.0) - mean; }
  // What is lost where the offset is rounded to a float.
  double rest(int64_t c, double mean) const { return exact_offset(c, mean) - k_offset[c]; }

  // z = (h - mean) rstd weight + bias
  void set_affine(int64_t c, double mean, double rstd) const {
    const double scale = weight[c] * rstd;
    k_offset[c] = static_cast<float>(exact_offset(c, mean));
    k_scale[c] = static_cast<float>(scale);
    k_bias[c] = static_cast<float>(bias[c] + rest(c, mean) * scale);
  }
};

// What forward and backward share, for T of float, Half and BFloat16. Scratch space has `stride` floats or doubles for an
// image's channels.
template <class T>
struct Plan {
  const GroupNormSilu& call;
  const Cut cut;
  const int64_t channels, pixels, groups, group_channels, stride;
  const bool planes, stream, vectors;
  const std::vector<float> weight, bias, shift;  // shift is empty where there is none
  std::vector<float> coefficients;
  std::vector<char> sane, flush;  // by group: whether floats can do it; whether subnormal numbers may be flushed

  explicit Plan(const GroupNormSilu& call)
      : call(call),
        cut(call),
        channels(call.channels),
        pixels(call.spatial),
        groups(call.groups),
        group_channels(channels / groups),
        stride(up(channels, kPad) * kPad),
        planes(!call.channels_last),
        stream(outgrows_cache(call.images * channels * pixels * sizeof(T))),
        vectors((planes ? pixels : channels) >= kRun && group_channels * pixels >= kGroup),
        weight(widened(call.weight, 1, 1.0f)),
        bias(widened(call.bias, 1, 0.0f)),
        shift(widened(call.shift, call.shift ? call.images : 0, 0.0f)),
        coefficients(5 * call.images * stride),
        sane(call.images * groups),
        flush(call.images * groups) {}

  int64_t image(int64_t item) const { return planes ? item / groups : item; }
  int64_t first_channel(int64_t item) const { return planes ? item % groups * group_channels : 0; }
  int64_t first_group(int64_t item) const { return planes ? item : item * groups; }
  int64_t end_group(int64_t item) const { return planes ? item + 1 : (item + 1) * groups; }

  // Where an item begins in a tensor whose images are `image_stride` apart; null stays null.
  template <class U>
  U* at(U* tensor, int64_t image_stride, int64_t item) const {
    return tensor ? tensor + image(item) * image_stride + first_channel(item) * (planes ? pixels : 1) : nullptr;
  }
  template <class U>
  U* dense(U* tensor, int64_t item) const {
    return at(tensor, channels * pixels, item);
  }

  Part<T> item(int64_t item) const {
    return {at(static_cast<const T*>(call.x), call.x_image, item),
            at(static_cast<const T*>(call.residual), call.residual_image, item),
            cut.item_channels,
            pixels,
            0,
            pixels,
            0,
            cut.item_channels};
  }
  Part<T> part(int64_t item, int64_t i) const {
    const int64_t block = i / cut.pieces, piece = i % cut.pieces;
    Part<T> part = this->item(item);
    part.begin = piece * cut.pixels;
    part.end = piece + 1 == cut.pieces ? part.end : part.begin + cut.pixels;
    part.first = block * cut.channels;
    part.last = block + 1 == cut.blocks ? part.last : part.first + cut.channels;
    return part;
  }

  // An item's parameters, and its place in the coefficients.
  Channels of(int64_t item) {
    const int64_t c = first_channel(item), row = image(item) * stride + c, step = call.images * stride;
    float* k = coefficients.data() + row;
    return {weight.data() + c, bias.data() + c, shift.empty() ? nullptr : shift.data() + row, k, k + step, k + 2 * step,
            k + 3 * step,      k + 4 * step};
  }

  ExactGroup<T, float> exact(int64_t group) const {
    return exact_group<T>(call, weight.data(), bias.data(), shift.empty() ? nullptr : shift.data(), stride, group);
  }
  bool flushes(int64_t item) const {
    return std::find(flush.begin() + first_group(item), flush.begin() + end_group(item), 0) == flush.begin() + end_group(item);
  }

 private:
  std::vector<float> widened(const void* from, int64_t rows, float otherwise) const {
    std::vector<float> wide(rows * stride, otherwise);
    for (int64_t row = 0; from && row < rows; ++row) {
      for (int64_t c = 0; c < channels; ++c) wide[row * stride + c] = value_of(static_cast<const T*>(from)[row * channels + c]);
    }
    return wide;
  }
};

}  // namespace ldmkit::group_norm
