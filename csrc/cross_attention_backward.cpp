// Attention's backward pass on the CPU (Dao et al. 2022, arXiv:2205.14135, algorithm 4): weights are computed again from the
// saved log-sum-exp; with dP = dO V^T, delta = rowsum(dO O) - dlse and dS = P (dP - delta),
//   dV = P^T dO,  dQ = scale dS K,  dK = scale dS^T Q.
// A block of keys is packed once and meets the queries block by block, so that P and dS stay in the second-level cache.
#include <cmath>

#include "cross_attention_keys.h"
#include "cross_attention_machines.h"

namespace ldmkit {
namespace attention {
namespace {

constexpr int64_t kKeyStep = 96;  // blocks of keys are multiples of this: of every machine's kRows, and of its vectors
constexpr int64_t kBlockKeys = 5 * kKeyStep;  // at most
constexpr int64_t kBlockBytes = 400 << 10;    // of packed keys and values
constexpr int64_t kMostChunks = 8;

// How a head is cut up, from its shape alone.
template <class M>
struct Plan {
  using Element = typename M::Element;
  static constexpr int W = M::W, kDepth = M::Operand::kDepth;
  static constexpr int64_t block_queries = 48 * kDepth;
  int64_t padded_width, staged, depth;  // as in the forward pass
  int64_t block_keys, stride;
  int64_t chunks, query_chunk, key_chunk;

  explicit Plan(const AttentionInputs& in) {
    padded_width = round_up(std::max<int64_t>(in.width, 1), W);
    staged = padded_width / kDepth;
    depth = ceil_div(in.width, kDepth);
    const int64_t fitting = kBlockBytes / (3 * staged * int64_t(sizeof(Element)));
    block_keys =
        std::clamp<int64_t>(fitting / kKeyStep * kKeyStep, kKeyStep, std::min(kBlockKeys, round_up(in.keys + 1, kKeyStep)));
    stride = block_keys + 16;
    const int64_t blocks = std::max<int64_t>(1, ceil_div(in.keys, block_keys));
    key_chunk = ceil_div(blocks, kMostChunks) * block_keys;
    chunks = std::max<int64_t>(1, ceil_div(in.keys, key_chunk));
    query_chunk = round_up(ceil_div(in.queries, chunks), block_queries);
  }
};

// What all pieces of a head share: its keys, and sums in fp32.
struct HeadMemory {
  Scratch scratch;
  Keys* keys;
  int32_t* index;
  float *key_bias, *dq, *dk, *dv, *lse, *delta;

  template <class M>
  HeadMemory(const AttentionInputs& in, const Plan<M>& plan, char* base) : scratch{base} {
    const int64_t keys_padded = round_up(in.keys + 1, plan.block_keys), queries_padded = plan.chunks * plan.query_chunk;
    keys = scratch.take<Keys>(1);
    index = scratch.take<int32_t>(in.keys);
    key_bias = scratch.take<float>(keys_padded);
    lse = scratch.take<float>(queries_padded);
    delta = scratch.take<float>(queries_padded);
    dq = scratch.take<float>(queries_padded * plan.padded_width);
    dk = scratch.take<float>(keys_padded * plan.padded_width);
    dv = scratch.take<float>(keys_padded * plan.padded_width);
  }
};

template <class M>
struct Workspace {
  using Element = typename M::Element;
  Scratch scratch;
  Element *staged, *kt, *vt, *k;              // a block of keys: K^T, V^T, K
  Element *q_rows, *grad_rows, *q, *grad;     // a block of queries, as rows and as columns
  Element *ds_rows, *p_columns, *ds_columns;  // dS by query; P and dS by key
  float *scores, *dp, *bias;

  Workspace(const AttentionInputs&, const Plan<M>& plan, char* base) : scratch{base} {
    const int64_t keys = plan.block_keys, queries = plan.block_queries, kDepth = plan.kDepth;
    staged = scratch.take<Element>(keys * plan.staged + M::W);
    kt = scratch.take<Element>(keys * plan.staged);
    vt = scratch.take<Element>(keys * plan.staged);
    k = scratch.take<Element>(keys * plan.staged);
    q_rows = scratch.take<Element>(queries * plan.staged + M::W);
    grad_rows = scratch.take<Element>(queries * plan.staged + M::W);
    q = scratch.take<Element>(queries * plan.staged);
    grad = scratch.take<Element>(queries * plan.staged);
    ds_rows = scratch.take<Element>(queries * plan.stride / kDepth);
    p_columns = scratch.take<Element>(queries / kDepth * plan.stride);
    ds_columns = kDepth == 1 ? ds_rows : scratch.take<Element>(queries / kDepth * plan.stride);
    scores = scratch.take<float>(M::kRows * plan.stride);
    dp = scratch.take<float>(M::kRows * plan.stride);
    bias = scratch.take<float>(M::kRows * plan.stride);
  }
};

// delta of W queries, in the very order in which products sum: with one key, dP - delta is 0 exactly.
template <class M>
LDMKIT_INLINE Floats<M::W> row_products(const typename M::Element* a_columns, const typename M::Element* b_columns,
                                        int64_t depth) {
  constexpr int W = M::W;
  Floats<W> total = {};
  for (int64_t k = 0; k < depth;) {
    Floats<W> sum = {};
    for (const int64_t end = std::min(depth, k + kLongestSum); k < end; ++k) {
      sum = M::Operand::template add_product<W>(sum, load<W>(reinterpret_cast<const float*>(a_columns + k * W)),
                                                load<W>(reinterpret_cast<const float*>(b_columns + k * W)));
    }
    total += sum;
  }
  return total;
}

template <class M>
LDMKIT_INLINE void start(const AttentionInputs& in, const AttentionGradients& g, int64_t head, char* memory, char* workspace) {
  constexpr int W = M::W;
  const Plan<M> plan(in);
  const HeadMemory m(in, plan, memory);
  const Workspace<M> w(in, plan, workspace);
  const int64_t b = head / in.heads, h = head % in.heads;
  *m.keys = settle_keys(in, b, h, m.index, m.key_bias);
  std::memset(m.dq, 0, m.scratch.next - reinterpret_cast<char*>(m.dq));
  const auto* lse = static_cast<const float*>(g.lse) + head * in.queries;
  const auto* grad_lse = g.grad_lse == nullptr ? nullptr : static_cast<const float*>(g.grad_lse) + head * in.queries;
  for (int64_t l = 0; l < plan.chunks * plan.query_chunk; l += W) {
    for (int64_t i = 0; i < W; ++i) {
      if (l + i < in.queries) {
        stage_row<M>(in.dtype, row_of(g.grad, in.dtype, b, h, l + i), in.width, w.q_rows + i * plan.staged, plan.staged);
        stage_row<M>(in.dtype, row_of(g.out, in.dtype, b, h, l + i), in.width, w.grad_rows + i * plan.staged, plan.staged);
      } else {
        std::memset(w.q_rows + i * plan.staged, 0, plan.staged * sizeof(*w.q_rows));
        std::memset(w.grad_rows + i * plan.staged, 0, plan.staged * sizeof(*w.grad_rows));
      }
    }
    pack_transposed<M>(w.q_rows, plan.staged, 1, plan.depth, w.q);
    pack_transposed<M>(w.grad_rows, plan.staged, 1, plan.depth, w.grad);
    store<W>(m.delta + l, row_products<M>(w.q, w.grad, plan.depth));
    for (int64_t i = l; i < l + W; ++i) {
      if (i < in.queries && grad_lse != nullptr) m.delta[i] -= grad_lse[i];
      // A row without keys, and rows past the last: all their weights are exp(-inf) = 0.
      m.lse[i] = i < in.queries && lse[i] != -kInfinity ? lse[i] : kInfinity;
    }
  }
}

// Rows [begin, end), and zeros up to `count` of them, as rows and as columns of a product.
template <class M>
LDMKIT_INLINE void stage_queries(Dtype dtype, const HeadRows<const void>& rows, int64_t b, int64_t h, int64_t begin,
                                 int64_t end, int64_t count, int64_t width, const Plan<M>& plan, typename M::Element* to,
                                 typename M::Element* packed) {
  for (int64_t l = begin; l < end; ++l) {
    stage_row<M>(dtype, row_of(rows, dtype, b, h, l), width, to + (l - begin) * plan.staged, plan.staged);
  }
  std::memset(to + (end - begin) * plan.staged, 0, (count - (end - begin)) * plan.staged * sizeof(*to));
  pack_rows<M>(to, plan.staged, count, plan.padded_width / M::W, packed);
}

// One packed block of keys, `count` of them from `key` on, meets queries [begin, end), at most block_queries of them.
template <class M>
LDMKIT_INLINE void meet(const AttentionInputs& in, const AttentionGradients& g, int64_t b, int64_t h, int64_t begin,
                        int64_t end, int64_t key, int64_t count, const Plan<M>& plan, const HeadMemory& m,
                        const Workspace<M>& w) {
  constexpr int W = M::W, kRows = M::kRows, kDepth = M::Operand::kDepth;
  const int64_t key_vectors = ceil_div(count, W), width_vectors = plan.padded_width / W;
  const int64_t queries = round_up(end - begin, kRows * kDepth), query_depth = queries / kDepth;
  stage_queries<M>(in.dtype, in.q, b, h, begin, end, queries, in.width, plan, w.q_rows, w.q);
  stage_queries<M>(in.dtype, g.grad, b, h, begin, end, queries, in.width, plan, w.grad_rows, w.grad);
  for (int64_t i = 0; i < queries; i += kRows) {
    const int64_t l = begin + i;
    product<M>(w.q_rows + i * plan.staged, plan.staged, w.kt, plan.depth, key_vectors, float(in.scale), false, w.scores,
               plan.stride);
    product<M>(w.grad_rows + i * plan.staged, plan.staged, w.vt, plan.depth, key_vectors, 1.0f, false, w.dp, plan.stride);
    const float* bias = m.keys->bias == nullptr ? nullptr : m.key_bias + key;
    int64_t bias_stride = 0;
    if (m.keys->rows != nullptr) {
      for (int64_t r = 0; r < kRows; ++r) {
        widen_mask<W>(in, m.keys->rows, std::min(l + r, end - 1), key, count, w.bias + r * plan.stride);
      }
      bias = w.bias, bias_stride = plan.stride;
    }
    M::softmax_backward(w.scores, w.dp, plan.stride, bias, bias_stride, count, m.lse + l, m.delta + l,
                        w.ds_rows + i * plan.stride / kDepth, w.p_columns + i / kDepth * plan.stride,
                        w.ds_columns + i / kDepth * plan.stride);
  }
  for (int64_t i = 0; i < queries; i += kRows) {
    product<M>(w.ds_rows + i * plan.stride / kDepth, plan.stride / kDepth, w.k, ceil_div(count, kDepth), width_vectors, 1.0f,
               true, m.dq + (begin + i) * plan.padded_width, plan.padded_width);
  }
  for (int64_t s = 0; s < count; s += kRows) {
    const int64_t at = (key + s) * plan.padded_width;
    product<M, true>(w.p_columns + s, plan.stride, w.grad, query_depth, width_vectors, 1.0f, true, m.dv + at,
                     plan.padded_width);
    product<M, true>(w.ds_columns + s, plan.stride, w.q, query_depth, width_vectors, 1.0f, true, m.dk + at, plan.padded_width);
  }
}

template <class M>
LDMKIT_INLINE void piece(const AttentionInputs& in, const AttentionGradients& g, int64_t head, int64_t query_chunk,
                         int64_t key_chunk, char* memory, char* workspace) {
  const Plan<M> plan(in);
  const HeadMemory m(in, plan, memory);
  const Workspace<M> w(in, plan, workspace);
  const int64_t b = head / in.heads, h = head % in.heads;
  const int64_t key_end = std::min(m.keys->count, (key_chunk + 1) * plan.key_chunk);
  const int64_t query_end = std::min(in.queries, (query_chunk + 1) * plan.query_chunk);
  for (int64_t key = key_chunk * plan.key_chunk; key < key_end; key += plan.block_keys) {
    const int64_t count = std::min(plan.block_keys, key_end - key), vectors = ceil_div(count, M::W);
    stage_keys<M>(in.dtype, in.v, b, h, in.width, m.index + key, count, w.staged, plan.staged);
    pack_transposed<M>(w.staged, plan.staged, vectors, plan.depth, w.vt);
    stage_keys<M>(in.dtype, in.k, b, h, in.width, m.index + key, count, w.staged, plan.staged);
    pack_transposed<M>(w.staged, plan.staged, vectors, plan.depth, w.kt);
    pack_rows<M>(w.staged, plan.staged, count, plan.padded_width / M::W, w.k);
    for (int64_t l = query_chunk * plan.query_chunk; l < query_end; l += plan.block_queries) {
      meet<M>(in, g, b, h, l, std::min(l + plan.block_queries, query_end), key, count, plan, m, w);
    }
  }
}

template <class M>
LDMKIT_INLINE void finish(const AttentionInputs& in, const AttentionGradients& g, int64_t head, char* memory) {
  constexpr int W = M::W;
  const Plan<M> plan(in);
  const HeadMemory m(in, plan, memory);
  const int64_t b = head / in.heads, h = head % in.heads, bytes = in.width * size_of(in.dtype);
  const float scale = float(in.scale);
  for (int64_t l = 0; l < in.queries; ++l) {
    write_row<W>(in.dtype, m.dq + l * plan.padded_width, scale, in.width, row_of(g.dq, in.dtype, b, h, l));
  }
  if (m.keys->count < in.keys) {
    for (int64_t s = 0; s < in.keys; ++s) {
      std::memset(row_of(g.dk, in.dtype, b, h, s), 0, bytes);
      std::memset(row_of(g.dv, in.dtype, b, h, s), 0, bytes);
    }
  }
  for (int64_t i = 0; i < m.keys->count; ++i) {
    const int64_t s = m.keys->rows == nullptr ? m.index[i] : i;
    write_row<W>(in.dtype, m.dk + i * plan.padded_width, scale, in.width, row_of(g.dk, in.dtype, b, h, s));
    write_row<W>(in.dtype, m.dv + i * plan.padded_width, 1.0f, in.width, row_of(g.dv, in.dtype, b, h, s));
  }
}

template <class M>
AttentionBackwardPlan plan_of(const AttentionInputs& in) {
  const Plan<M> plan(in);
  return {plan.chunks, reinterpret_cast<int64_t>(HeadMemory(in, plan, nullptr).scratch.next),
          reinterpret_cast<int64_t>(Workspace<M>(in, plan, nullptr).scratch.next)};
}

#define LDMKIT_ATTENTION_BACKWARD(NAME, TARGET, MACHINE)                                                              \
  TARGET void start_##NAME(const AttentionInputs& in, const AttentionGradients& g, int64_t head, char* memory,        \
                           char* workspace) {                                                                         \
    start<MACHINE>(in, g, head, memory, workspace);                                                                   \
  }                                                                                                                   \
  TARGET void piece_##NAME(const AttentionInputs& in, const AttentionGradients& g, int64_t head, int64_t query_chunk, \
                           int64_t key_chunk, char* memory, char* workspace) {                                        \
    piece<MACHINE>(in, g, head, query_chunk, key_chunk, memory, workspace);                                           \
  }                                                                                                                   \
  TARGET void finish_##NAME(const AttentionInputs& in, const AttentionGradients& g, int64_t head, char* memory) {     \
    finish<MACHINE>(in, g, head, memory);                                                                             \
  }

LDMKIT_ATTENTION_BACKWARD(baseline, , Baseline)
#if defined(__x86_64__)
LDMKIT_ATTENTION_BACKWARD(avx2, LDMKIT_TARGET_AVX2, Avx2)
LDMKIT_ATTENTION_BACKWARD(avx512, LDMKIT_TARGET_AVX512, Avx512)
LDMKIT_ATTENTION_BACKWARD(avx512_pairs, LDMKIT_TARGET_AVX512_BF16, Avx512Pairs)
#endif

struct Variant {
  decltype(&plan_of<Baseline>) plan;
  decltype(&start_baseline) start;
  decltype(&piece_baseline) piece;
  decltype(&finish_baseline) finish;
};

Variant variant(Dtype dtype) {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::avx512_bf16:
      if (dtype == Dtype::bf16) return {plan_of<Avx512Pairs>, start_avx512_pairs, piece_avx512_pairs, finish_avx512_pairs};
      [[fallthrough]];
    case InstructionSet::avx512: return {plan_of<Avx512>, start_avx512, piece_avx512, finish_avx512};
    case InstructionSet::avx2: return {plan_of<Avx2>, start_avx2, piece_avx2, finish_avx2};
    case InstructionSet::baseline: break;
  }
#endif
  return {plan_of<Baseline>, start_baseline, piece_baseline, finish_baseline};
}

}  // namespace
}  // namespace attention

AttentionBackwardPlan attention_backward_plan_cpu(const AttentionInputs& in) {
  return in.dtype == Dtype::f64 ? AttentionBackwardPlan{1, 0, 0} : attention::variant(in.dtype).plan(in);
}

void attention_backward_start_cpu(const AttentionInputs& in, const AttentionGradients& g, int64_t head, void* memory,
                                  void* workspace) {
  if (in.dtype == Dtype::f64) return attention_backward_fp64(in, g, head);
  attention::variant(in.dtype).start(in, g, head, static_cast<char*>(memory), static_cast<char*>(workspace));
}

void attention_backward_piece_cpu(const AttentionInputs& in, const AttentionGradients& g, int64_t head, int64_t query_chunk,
                                  int64_t key_chunk, void* memory, void* workspace) {
  if (in.dtype == Dtype::f64) return;
  attention::variant(in.dtype).piece(in, g, head, query_chunk, key_chunk, static_cast<char*>(memory),
                                     static_cast<char*>(workspace));
}

void attention_backward_finish_cpu(const AttentionInputs& in, const AttentionGradients& g, int64_t head, void* memory) {
  if (in.dtype != Dtype::f64) attention::variant(in.dtype).finish(in, g, head, static_cast<char*>(memory));
}

}  // namespace ldmkit
