// How the loops of GEGLU for the CPU are dealt out, shared by the bindings of geglu and geglu_linear.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "geglu.h"
#include "large_output.h"

namespace ldmkit {

// Prepares an output of rows that are multiples of n long: huge pages where it is large, and whether to write it past the caches.
inline bool place_large_output(const at::Tensor& output, int64_t n) {
  void* data = output.mutable_data_ptr();
  ask_for_huge_pages(data, output.nbytes());
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 64 == 0 && n * output.element_size() % 64 == 0;
  return aligned && outgrows_cache(output.nbytes());
}

// Runs `work` over slices of all rows, on torch's threads. A slice's arithmetic does not depend on how they are dealt out.
template <class Work>
void for_each_slice(int64_t rows, int64_t n, bool stream, const Work& work) {
  constexpr int64_t kColumns = 8192;
  const int64_t across = (n + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, 2 * kColumns / std::min(n, kColumns));
  at::parallel_for(0, rows * across, grain, [&](int64_t begin, int64_t end) {
    if (across == 1) return work(GegluSlice{n, begin, end, 0, n, stream});
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across, column = i % across * kColumns;
      work(GegluSlice{n, row, row + 1, column, std::min(kColumns, n - column), stream});
    }
  });
}

}  // namespace ldmkit
