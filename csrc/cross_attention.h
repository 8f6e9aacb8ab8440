// Attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1): (B, H, L, D) queries over (B, H, S, D) keys and values. Free of
// torch: raw pointers, strides in elements. Neighbours in the last dimension are adjacent everywhere.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace ldmkit {

// A tensor (B, H, rows, D).
template <class Void>
struct HeadRows {
  Void* data;
  int64_t batch, head, row;
};

// A mask that broadcasts to (B, H, L, S), with stride 0 where it is broadcast; no data is no mask. Bytes, true where a query
// may attend to a key, or numbers in the dtype of q, added to the scores. `hidden` (its B, its H, S) tells the keys no query
// may attend to.
struct AttentionMask {
  const void* data;
  bool additive;
  int64_t batch, head, row;
  const bool* hidden;
  int64_t hidden_batch, hidden_head;
};

struct AttentionInputs {
  Dtype dtype;
  int64_t batches, heads, queries, keys, width;
  double scale;
  HeadRows<const void> q, k, v;
  AttentionMask mask;
};

// Attention on the CPU. Work is dealt out in blocks of queries, `attention_blocks_cpu` of them over all heads, each the same
// arithmetic whoever runs it; `workspace` is one caller's own. lse is a dense (B, H, L), in fp32, or fp64 where q is.
int64_t attention_blocks_cpu(const AttentionInputs& inputs);
int64_t attention_forward_workspace_cpu(const AttentionInputs& inputs);
void attention_forward_cpu(const AttentionInputs& inputs, const HeadRows<void>& out, void* lse, int64_t block_begin,
                           int64_t block_end, void* workspace);

// What the backward pass reads besides, and what it writes. grad_lse may be null.
struct AttentionGradients {
  HeadRows<const void> grad, out;
  const void *lse, *grad_lse;
  HeadRows<void> dq, dk, dv;
};

// Its work on a head is a square of `chunks` x `chunks` pieces, queries by keys. Pieces of different rows and columns may run
// at the same time; in step i, the queries of chunk (j + i) % chunks meet the keys of chunk j, so that every sum has one order,
// whoever runs what. `head` memory is shared by all pieces of a head; `start` comes before them and `finish` after.
struct AttentionBackwardPlan {
  int64_t chunks, head_bytes, workspace_bytes;
};
AttentionBackwardPlan attention_backward_plan_cpu(const AttentionInputs& inputs);
void attention_backward_start_cpu(const AttentionInputs& inputs, const AttentionGradients& gradients, int64_t head,
                                  void* memory, void* workspace);
void attention_backward_piece_cpu(const AttentionInputs& inputs, const AttentionGradients& gradients, int64_t head,
                                  int64_t query_chunk, int64_t key_chunk, void* memory, void* workspace);
void attention_backward_finish_cpu(const AttentionInputs& inputs, const AttentionGradients& gradients, int64_t head,
                                   void* memory);

// Both in fp64, for checks rather than speed; the backward takes whole heads.
void attention_forward_fp64(const AttentionInputs& inputs, const HeadRows<void>& out, double* lse, int64_t block_begin,
                            int64_t block_end);
void attention_backward_fp64(const AttentionInputs& inputs, const AttentionGradients& gradients, int64_t head);

// Queries of one such block.
constexpr int64_t kAttentionBlockQueries = 96;

}  // namespace ldmkit
