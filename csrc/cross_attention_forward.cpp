// Attention's forward pass on the CPU. Keys and values are packed once per head, in blocks that stay in the second-level cache;
// a few queries at a time meet a whole block: their scores, softmax and the product with the values never leave the first
// level. Where all keys fit one block (<= 512), that is the plain softmax; beyond, the online one (Milakov and Gimelshein 2018,
// arXiv:1805.02867, algorithm 3; Dao et al. 2022, arXiv:2205.14135, algorithm 1).
#include <cmath>

#include "cross_attention_keys.h"
#include "cross_attention_machines.h"

namespace ldmkit {
namespace attention {
namespace {

constexpr int64_t kBlockQueries = kAttentionBlockQueries;  // a multiple of every machine's kRows
constexpr int64_t kBlockKeys = 512;                        // at most
constexpr int64_t kBlockBytes = 400 << 10;                 // of packed keys and values
constexpr int64_t kRunBytes = 1 << 20;                     // of unfinished outputs, where keys come in several blocks

// How a head is cut up, from its shape alone.
template <class M>
struct Plan {
  static constexpr int W = M::W, kDepth = M::Operand::kDepth;
  int64_t padded_width;  // numbers of a row, in whole vectors
  int64_t staged;        // elements of such a row
  int64_t depth;         // elements of a row
  int64_t block_keys, score_stride;
  int64_t run;         // queries that go through all keys together
  int64_t unfinished;  // rows of output that wait for more keys

  explicit Plan(const AttentionInputs& in) {
    padded_width = round_up(std::max<int64_t>(in.width, 1), W);
    staged = padded_width / kDepth;
    depth = ceil_div(in.width, kDepth);
    const int64_t fitting = kBlockBytes / (2 * staged * int64_t(sizeof(typename M::Element)));
    const int64_t most = std::clamp<int64_t>(fitting / 64 * 64, 64, kBlockKeys);
    const int64_t blocks = std::max<int64_t>(1, ceil_div(in.keys, most));
    block_keys = round_up(std::max<int64_t>(1, ceil_div(in.keys, blocks)), W * kDepth);
    score_stride = block_keys + 16;  // rows a power of two apart would share cache sets
    run = std::max<int64_t>(1, kRunBytes / (padded_width * 4) / kBlockQueries) * kBlockQueries;
    unfinished = blocks == 1 ? M::kRows : run;
  }
};

template <class M>
struct Workspace {
  using Element = typename M::Element;
  Scratch scratch;
  int32_t* index;
  float* key_bias;
  Element *staged, *k, *v, *q;
  float *scores, *bias, *out;
  RowSums sums;

  Workspace(const AttentionInputs& in, const Plan<M>& plan, char* base) : scratch{base} {
    index = scratch.take<int32_t>(in.keys);
    key_bias = scratch.take<float>(in.keys + plan.block_keys);
    staged = scratch.take<Element>(plan.block_keys * plan.staged + M::W);
    k = scratch.take<Element>(plan.block_keys * plan.staged);
    v = scratch.take<Element>(plan.block_keys * plan.staged);
    q = scratch.take<Element>(M::kRows * plan.staged);
    scores = scratch.take<float>(M::kRows * plan.score_stride);
    bias = scratch.take<float>(M::kRows * plan.score_stride);
    out = scratch.take<float>(plan.unfinished * plan.padded_width);
    sums.top = scratch.take<float>(plan.run);
    sums.total = scratch.take<float>(plan.run);
    sums.weight = scratch.take<float>(plan.run);
  }
};

// kRows queries from `l` on, as an operand: where they are, or, if that is no operand or the queries end, staged.
template <class M>
LDMKIT_INLINE const typename M::Element* query_rows(const AttentionInputs& in, int64_t b, int64_t h, int64_t l, int64_t rows,
                                                    const Plan<M>& plan, typename M::Element* staged, int64_t& stride) {
  constexpr int64_t kSize = 4;
  const bool same = M::Operand::kDepth == 2 ? in.width % 2 == 0 && in.q.row % 2 == 0 : in.dtype == Dtype::f32;
  const auto* first = reinterpret_cast<const typename M::Element*>(row_of(in.q, in.dtype, b, h, l));
  if (same && rows == M::kRows) {
    stride = in.q.row * size_of(in.dtype) / kSize;
    return first;
  }
  stride = plan.staged;
  for (int64_t i = 0; i < M::kRows; ++i) {
    if (i < rows) {
      stage_row<M>(in.dtype, row_of(in.q, in.dtype, b, h, l + i), in.width, staged + i * stride, stride);
    } else {
      std::memset(staged + i * stride, 0, stride * kSize);
    }
  }
  return staged;
}

// Rows of a tensor lie a whole token apart, which no hardware foresees.
template <class Void>
LDMKIT_INLINE void prefetch_rows(const AttentionInputs& in, const HeadRows<Void>& rows, int64_t b, int64_t h, int64_t begin,
                                 int64_t end) {
  const int64_t bytes = in.width * size_of(in.dtype);
  for (int64_t l = begin; l < end; ++l) {
    const char* row = row_of(rows, in.dtype, b, h, l);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, std::is_const_v<Void> ? 0 : 1);
    __builtin_prefetch(row + bytes - 1, std::is_const_v<Void> ? 0 : 1);
  }
}

// One block of keys, packed, for queries [begin, end) of one head.
template <class M>
LDMKIT_INLINE void attend_block(const AttentionInputs& in, const HeadRows<void>& out, int64_t b, int64_t h, int64_t begin,
                                int64_t end, const Keys& keys, int64_t key, int64_t count, const Plan<M>& plan,
                                const Workspace<M>& w) {
  constexpr int W = M::W, kRows = M::kRows;
  const bool first = key == 0, last = key + count == keys.count;
  const int64_t width_vectors = plan.padded_width / W, depth = ceil_div(count, M::Operand::kDepth);
  for (int64_t l = begin; l < end; l += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, end - l), at = l - begin;
    float* sums = w.out + (first && last ? 0 : at * plan.padded_width);

    prefetch_rows(in, in.q, b, h, std::min(end, l + kRows), std::min(end, l + 2 * kRows));
    if (last) prefetch_rows(in, out, b, h, l, l + rows);
    int64_t q_stride;
    const auto* q = query_rows<M>(in, b, h, l, rows, plan, w.q, q_stride);
    product<M>(q, q_stride, w.k, plan.depth, ceil_div(count, W), float(in.scale), false, w.scores, plan.score_stride);

    const float* bias = keys.bias == nullptr ? nullptr : keys.bias + key;
    int64_t bias_stride = 0;
    if (keys.rows != nullptr) {
      for (int64_t i = 0; i < rows; ++i) widen_mask<W>(in, keys.rows, l + i, key, count, w.bias + i * plan.score_stride);
      bias = w.bias, bias_stride = plan.score_stride;
    }
    float decay[kRows];
    for (int64_t i = 0; i < kRows; i += M::kTogether) {
      M::softmax(w.scores + i * plan.score_stride, plan.score_stride, bias == nullptr ? nullptr : bias + i * bias_stride,
                 bias_stride, count, first, {w.sums.top + at + i, w.sums.total + at + i, w.sums.weight + at + i}, decay + i);
    }
    for (int64_t i = 0; i < rows && !first; ++i) {
      const Floats<W> decays = splat<W>(decay[i]);
      float* row = sums + i * plan.padded_width;
      for (int64_t j = 0; j < plan.padded_width; j += W) store<W>(row + j, load<W>(row + j) * decays);
    }

    const auto* weights = reinterpret_cast<const typename M::Element*>(w.scores);
    product<M>(weights, plan.score_stride, w.v, depth, width_vectors, 1.0f, !first, sums, plan.padded_width);
    for (int64_t i = 0; i < rows && last; ++i) {
      const float factor = w.sums.weight[at + i] == 0.0f ? 0.0f : 1.0f / w.sums.weight[at + i];
      write_row<W>(in.dtype, sums + i * plan.padded_width, factor, in.width, row_of(out, in.dtype, b, h, l + i));
    }
  }
}

// Queries [begin, end) of one head over all its keys.
template <class M>
LDMKIT_INLINE void attend(const AttentionInputs& in, const HeadRows<void>& out, float* lse, int64_t b, int64_t h, int64_t begin,
                          int64_t end, const Keys& keys, const Plan<M>& plan, const Workspace<M>& w) {
  for (int64_t key = 0; key < keys.count; key += plan.block_keys) {
    const int64_t count = std::min(plan.block_keys, keys.count - key);
    stage_keys<M>(in.dtype, in.k, b, h, in.width, keys.index + key, count, w.staged, plan.staged);
    pack_transposed<M>(w.staged, plan.staged, ceil_div(count, M::W), plan.depth, w.k);
    stage_keys<M>(in.dtype, in.v, b, h, in.width, keys.index + key, count, w.staged, plan.staged);
    pack_rows<M>(w.staged, plan.staged, count, plan.padded_width / M::W, w.v);
    attend_block<M>(in, out, b, h, begin, end, keys, key, count, plan, w);
  }
  for (int64_t l = begin; l < end; ++l) {
    const float total = keys.count == 0 ? 0.0f : w.sums.total[l - begin];
    lse[(b * in.heads + h) * in.queries + l] = total == 0.0f ? -kInfinity : w.sums.top[l - begin] + std::log(total);
    if (keys.count == 0) std::memset(row_of(out, in.dtype, b, h, l), 0, in.width * size_of(in.dtype));
  }
}

template <class M>
LDMKIT_INLINE void forward(const AttentionInputs& in, const HeadRows<void>& out, float* lse, int64_t block_begin,
                           int64_t block_end, char* workspace) {
  const Plan<M> plan(in);
  const Workspace<M> w(in, plan, workspace);
  const int64_t blocks = ceil_div(in.queries, kBlockQueries);
  Keys keys = {};
  for (int64_t block = block_begin; block < block_end;) {
    const int64_t head = block / blocks, b = head / in.heads, h = head % in.heads;
    if (block == block_begin || block % blocks == 0) keys = settle_keys(in, b, h, w.index, w.key_bias);
    const int64_t stop = std::min({(head + 1) * blocks, block_end, block + plan.run / kBlockQueries});
    const int64_t begin = block % blocks * kBlockQueries, end = std::min(in.queries, begin + (stop - block) * kBlockQueries);
    attend<M>(in, out, lse, b, h, begin, end, keys, plan, w);
    block = stop;
  }
}

template <class M>
int64_t workspace_bytes(const AttentionInputs& in) {
  return reinterpret_cast<int64_t>(Workspace<M>(in, Plan<M>(in), nullptr).scratch.next);
}

#define LDMKIT_ATTENTION_FORWARD(NAME, TARGET, MACHINE)                                                                    \
  TARGET void forward_##NAME(const AttentionInputs& in, const HeadRows<void>& out, float* lse, int64_t begin, int64_t end, \
                             char* workspace) {                                                                            \
    forward<MACHINE>(in, out, lse, begin, end, workspace);                                                                 \
  }

LDMKIT_ATTENTION_FORWARD(baseline, , Baseline)
#if defined(__x86_64__)
LDMKIT_ATTENTION_FORWARD(avx2, LDMKIT_TARGET_AVX2, Avx2)
LDMKIT_ATTENTION_FORWARD(avx512, LDMKIT_TARGET_AVX512, Avx512)
LDMKIT_ATTENTION_FORWARD(avx512_pairs, LDMKIT_TARGET_AVX512_BF16, Avx512Pairs)
#endif

struct Variant {
  decltype(&forward_baseline) forward;
  decltype(&workspace_bytes<Baseline>) workspace;
};

Variant variant(Dtype dtype) {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::avx512_bf16:
      if (dtype == Dtype::bf16) return {forward_avx512_pairs, workspace_bytes<Avx512Pairs>};
      [[fallthrough]];
    case InstructionSet::avx512: return {forward_avx512, workspace_bytes<Avx512>};
    case InstructionSet::avx2: return {forward_avx2, workspace_bytes<Avx2>};
    case InstructionSet::baseline: break;
  }
#endif
  return {forward_baseline, workspace_bytes<Baseline>};
}

}  // namespace
}  // namespace attention

int64_t attention_blocks_cpu(const AttentionInputs& in) {
  return in.batches * in.heads * attention::ceil_div(in.queries, attention::kBlockQueries);
}

int64_t attention_forward_workspace_cpu(const AttentionInputs& in) {
  return in.dtype == Dtype::f64 ? 0 : attention::variant(in.dtype).workspace(in);
}

void attention_forward_cpu(const AttentionInputs& in, const HeadRows<void>& out, void* lse, int64_t block_begin,
                           int64_t block_end, void* workspace) {
  if (in.dtype == Dtype::f64) return attention_forward_fp64(in, out, static_cast<double*>(lse), block_begin, block_end);
  attention::variant(in.dtype).forward(in, out, static_cast<float*>(lse), block_begin, block_end,
                                       static_cast<char*>(workspace));
}

}  // namespace ldmkit
