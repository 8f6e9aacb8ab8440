// How GroupNorm is cut up for the GPU.
//
// A pack is V neighbours in memory. A line is the packs that share their channels: one channel of NCHW (Q = 1), V neighbouring
// channels of NHWC (Q = V); its steps are V pixels, or one. A slice is some whole neighbouring groups; its lines are cut into
// bands (one, unless a group has hundreds of lines), its steps into parts, and a tile = band x part is what a block works on,
// staged in shared memory. In a tile, `lanes` threads share each line, and a thread has one line. Which tile, line and order of
// sums an element falls in depends on the shape of one image alone, never on how many there are or on how pointers are aligned.
#pragma once

#include <cstdint>

#include "common.cuh"

namespace ldmkit::group_norm {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Cut {
  int groups, group_channels;  // of an image; of a group
  int slices, slice_groups;    // of an image; of a slice
  int lines, bands, band_lines, band_channels, lanes;
  int tiles, parts, part_steps, step_pixels;  // of a slice: tiles = bands * parts; no part has more than part_steps
  int64_t steps, slice_stride, line_stride, step_stride;
  bool channels_last, slices_first, once;  // once: the tiles of a group meet in one launch

  __device__ int64_t first_step(int part) const { return steps * part / parts; }
  __device__ int channels() const { return groups * group_channels; }
  __device__ int pitch() const { return band_lines * lanes; }
  // Packs of a staged tensor, rounded up so that it ends at a multiple of 16 bytes.
  __host__ __device__ int slots() const { return ((part_steps + lanes - 1) / lanes * band_lines * lanes + 7) / 8 * 8; }
};

// What a tile has of a group: `size` channels (none or fewer where it is none), from the tile's channel `begin` on.
struct Channels {
  int begin, size;
};

// How many elements a tile has of a group of its slice.
__device__ inline int elements(const Cut& cut, int slice_group, int tile) {
  const int band = tile / cut.parts, part = tile % cut.parts;
  const int begin = max(slice_group * cut.group_channels, band * cut.band_channels);
  const int end = min((slice_group + 1) * cut.group_channels, (band + 1) * cut.band_channels);
  return max(end - begin, 0) * static_cast<int>(cut.first_step(part + 1) - cut.first_step(part)) * cut.step_pixels;
}

// The tile of a block, and where in it a thread stands. Threads beyond the tile's lines are not active and have no steps.
template <int Q>
struct Place {
  int64_t image, offset, stride;           // of the thread's first pack in its image, and from step to step, in elements
  int slice, tile, part, steps, channels;  // of the tile; its slice is the image's
  int slice_channel;                       // the tile's first channel, in its slice
  int line, lane, count;                   // of the thread, which has `count` steps
  bool active;

  __device__ Place(const Cut& cut, int64_t block) {
    const int fast = cut.slices_first ? cut.slices : cut.tiles, slow = cut.slices_first ? cut.tiles : cut.slices;
    const int64_t row = block / fast;
    const int i = static_cast<int>(block - row * fast), j = static_cast<int>(row % slow);
    image = row / slow;
    slice = cut.slices_first ? i : j;
    tile = cut.slices_first ? j : i;
    part = tile % cut.parts;
    const int first_line = tile / cut.parts * cut.band_lines, lines = min(cut.band_lines, cut.lines - first_line);
    const int64_t first_step = cut.first_step(part);
    steps = static_cast<int>(cut.first_step(part + 1) - first_step);
    slice_channel = first_line * Q;
    channels = lines * Q;
    const int thread = static_cast<int>(threadIdx.x);
    line = cut.channels_last ? thread % lines : thread / cut.lanes;
    lane = cut.channels_last ? thread / lines : thread % cut.lanes;
    active = thread < lines * cut.lanes;
    count = active && lane < steps ? (steps - lane + cut.lanes - 1) / cut.lanes : 0;
    offset = slice * cut.slice_stride + (first_line + line) * cut.line_stride + (first_step + lane) * cut.step_stride;
    stride = cut.lanes * cut.step_stride;
  }

  __device__ Channels of_group(const Cut& cut, int slice_group) const {
    const int begin = max(slice_group * cut.group_channels - slice_channel, 0);
    return {begin, min((slice_group + 1) * cut.group_channels - slice_channel, channels) - begin};
  }
  // The group, of the slice, of one of the thread's channels.
  __device__ int slice_group(const Cut& cut, int q) const { return (slice_channel + line * Q + q) / cut.group_channels; }
  // A group of the slice, in (image, group).
  __device__ int64_t group(const Cut& cut, int slice_group) const {
    return image * cut.groups + slice * cut.slice_groups + slice_group;
  }
  // The tile's first channel, in the image.
  __device__ int first_channel(const Cut& cut) const { return slice * cut.slice_groups * cut.group_channels + slice_channel; }
};

// A thread's packs of one tensor, and the places in shared memory, [step][thread], that they are copied to and that no other
// thread touches. Where pointers or strides forbid 16 bytes at once, elements come one by one to the same places.
template <class T, int V>
struct Stream {
  const T* from;
  int64_t stride;
  Pack<T, V>* slots;
  int pitch;
  bool aligned;

  __device__ void copy(int begin, int end) const {
    for (int step = begin; step < end; ++step) {
      const T* pack = from + step * stride;
      if constexpr (sizeof(Pack<T, V>) >= 4) {
        if (aligned) {
          cp_async<sizeof(Pack<T, V>)>(slots + step * pitch, pack);
          continue;
        }
      }
#pragma unroll
      for (int i = 0; i < V; ++i) slots[step * pitch].at[i] = pack[i];
    }
  }
  __device__ const Pack<T, V>& operator[](int step) const { return slots[step * pitch]; }
};

// Starts all copies of a thread's steps, copy(begin, end), then calls work(begin, end) for one chunk of them after another as
// they arrive.
template <class Copy, class Work>
__device__ inline void in_chunks(int count, const Copy& copy, const Work& work) {
  const int chunk = (count + 3) / 4;
  for (int i = 0; i < 4; ++i) {
    copy(min(count, i * chunk), min(count, (i + 1) * chunk));
    cp_async_commit();
  }
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    if (i == 0) cp_async_wait<3>();
    if (i == 1) cp_async_wait<2>();
    if (i == 2) cp_async_wait<1>();
    if (i == 3) cp_async_wait<0>();
    work(min(count, i * chunk), min(count, (i + 1) * chunk));
  }
}

}  // namespace ldmkit::group_norm
