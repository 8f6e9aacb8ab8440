#include "binding.h"

#include <algorithm>
#include <limits>

#include "cross_attention.h"
#include "large_output.h"

namespace ldmkit {
namespace {

// Neighbours in the last dimension adjacent: a view where they are, else a copy.
at::Tensor as_rows(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

template <class Void>
HeadRows<Void> head_rows(Void* data, const at::Tensor& tensor) {
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// (B, H, rows, D) whose memory is a dense (B, rows, H, D).
at::Tensor empty_rows(const at::Tensor& like) {
  return at::empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.options()).transpose(1, 2);
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && q.size(0) == k.size(0) && q.size(1) == k.size(1) &&
                  q.size(3) == k.size(3) && k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() &&
                  k.device() == q.device() && v.device() == q.device(),
              "cross_attention: q, k and v do not fit one another");
  if (!mask.has_value()) return;
  TORCH_CHECK(mask->dim() == 4 && mask->device() == q.device() &&
                  (mask->scalar_type() == at::kBool || mask->scalar_type() == q.scalar_type()),
              "cross_attention: the mask does not fit q");
  const int64_t full[4] = {q.size(0), q.size(1), q.size(2), k.size(2)};
  for (int i = 0; i < 4; ++i)
    TORCH_CHECK(mask->size(i) == 1 || mask->size(i) == full[i], "cross_attention: the mask does not fit q");
}

at::Tensor empty_lse(const at::Tensor& q) {
  const auto dtype = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(dtype));
}

void check_backward(const at::Tensor& q, const at::Tensor& grad, const std::optional<at::Tensor>& grad_lse,
                    const at::Tensor& out, const at::Tensor& lse) {
  const auto fits = [&](const at::Tensor& t) {
    return t.sizes() == q.sizes() && t.scalar_type() == q.scalar_type() && t.device() == q.device();
  };
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto fits_lse = [&](const at::Tensor& t) {
    return t.sizes() == q.sizes().slice(0, 3) && t.scalar_type() == wide && t.device() == q.device();
  };
  TORCH_CHECK(fits(grad) && fits(out) && fits_lse(lse) && (!grad_lse.has_value() || fits_lse(*grad_lse)),
              "cross_attention: the gradients, the output or the log-sum-exp do not fit q");
}

#ifndef LDMKIT_EMULATION

// A mask, and what must live as long as its pointers.
struct Mask {
  at::Tensor values, hidden;
  AttentionMask view = {};

  Mask(const std::optional<at::Tensor>& mask, int64_t keys) {
    if (!mask.has_value() || keys == 0) return;
    values = *mask;
    for (int dim = 0; dim < 3; ++dim) {
      if (values.stride(dim) == 0 && values.size(dim) > 1) values = values.narrow(dim, 0, 1);  // expanded
    }
    values = as_rows(values.expand({-1, -1, -1, keys}));
    view.additive = values.scalar_type() != at::kBool;
    hidden = (view.additive ? values.eq(-std::numeric_limits<double>::infinity()) : values.logical_not()).all(2).contiguous();
    view.data = values.const_data_ptr();
    view.batch = stride(values, 0), view.head = stride(values, 1), view.row = stride(values, 2);
    view.hidden = hidden.const_data_ptr<bool>();
    view.hidden_batch = stride(hidden, 0), view.hidden_head = stride(hidden, 1);
  }

  static int64_t stride(const at::Tensor& tensor, int64_t dim) { return tensor.size(dim) == 1 ? 0 : tensor.stride(dim); }
};

AttentionInputs inputs_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Mask& mask, double scale) {
  AttentionInputs inputs{};
  inputs.dtype = dtype_of(q);
  inputs.batches = q.size(0), inputs.heads = q.size(1), inputs.queries = q.size(2), inputs.keys = k.size(2),
  inputs.width = q.size(3);
  inputs.scale = scale;
  inputs.q = head_rows(q.const_data_ptr(), q);
  inputs.k = head_rows(k.const_data_ptr(), k);
  inputs.v = head_rows(v.const_data_ptr(), v);
  inputs.mask = mask.view;
  return inputs;
}

// Pieces of work, each `rows` queries by all keys, that are worth waking a thread for.
int64_t grain(int64_t rows, const AttentionInputs& inputs) {
  constexpr int64_t kWorth = 1 << 18;  // multiply-adds
  return std::max<int64_t>(1, kWorth / std::max<int64_t>(1, rows * inputs.keys * inputs.width));
}

at::Tensor empty_bytes(int64_t bytes) { return at::empty({bytes}, at::TensorOptions().dtype(at::kByte)); }

std::tuple<at::Tensor, at::Tensor> forward_cpu(const at::Tensor& q_any, const at::Tensor& k_any, const at::Tensor& v_any,
                                               const std::optional<at::Tensor>& mask_any, double scale) {
  check(q_any, k_any, v_any, mask_any);
  const at::Tensor q = as_rows(q_any), k = as_rows(k_any), v = as_rows(v_any), out = empty_rows(q), lse = empty_lse(q);
  const Mask mask(mask_any, k.size(2));
  const AttentionInputs inputs = inputs_of(q, k, v, mask, scale);
  const HeadRows<void> out_rows = head_rows(out.mutable_data_ptr(), out);
  void* lse_data = lse.mutable_data_ptr();
  ask_for_huge_pages(out_rows.data, out.nbytes());
  const int64_t bytes = attention_forward_workspace_cpu(inputs);
  at::parallel_for(0, attention_blocks_cpu(inputs), grain(std::min(inputs.queries, kAttentionBlockQueries), inputs),
                   [&](int64_t begin, int64_t end) {
                     const at::Tensor workspace = empty_bytes(bytes);
                     attention_forward_cpu(inputs, out_rows, lse_data, begin, end, workspace.mutable_data_ptr());
                   });
  return {out, lse};
}

// Where there are fewer heads than threads, the pieces of a head run side by side, else each head by itself: the sums are the
// same.
void run_backward(const AttentionInputs& inputs, const AttentionGradients& gradients) {
  const AttentionBackwardPlan plan = attention_backward_plan_cpu(inputs);
  const int64_t heads = inputs.batches * inputs.heads, n = plan.chunks;
  if (n == 1 || heads >= at::get_num_threads()) {
    at::parallel_for(0, heads, grain(inputs.queries, inputs), [&](int64_t begin, int64_t end) {
      const at::Tensor memory = empty_bytes(plan.head_bytes), workspace = empty_bytes(plan.workspace_bytes);
      void *memory_data = memory.mutable_data_ptr(), *workspace_data = workspace.mutable_data_ptr();
      for (int64_t head = begin; head < end; ++head) {
        attention_backward_start_cpu(inputs, gradients, head, memory_data, workspace_data);
        for (int64_t i = 0; i < n * n; ++i) {
          attention_backward_piece_cpu(inputs, gradients, head, (i % n + i / n) % n, i % n, memory_data, workspace_data);
        }
        attention_backward_finish_cpu(inputs, gradients, head, memory_data);
      }
    });
    return;
  }
  const at::Tensor memory = empty_bytes(heads * plan.head_bytes);
  char* memory_data = static_cast<char*>(memory.mutable_data_ptr());
  const auto memory_of = [&](int64_t head) { return memory_data + head * plan.head_bytes; };
  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    const at::Tensor workspace = empty_bytes(plan.workspace_bytes);
    for (int64_t head = begin; head < end; ++head) {
      attention_backward_start_cpu(inputs, gradients, head, memory_of(head), workspace.mutable_data_ptr());
    }
  });
  for (int64_t step = 0; step < n; ++step) {
    at::parallel_for(0, heads * n, 1, [&](int64_t begin, int64_t end) {
      const at::Tensor workspace = empty_bytes(plan.workspace_bytes);
      for (int64_t i = begin; i < end; ++i) {
        attention_backward_piece_cpu(inputs, gradients, i / n, (i % n + step) % n, i % n, memory_of(i / n),
                                     workspace.mutable_data_ptr());
      }
    });
  }
  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) attention_backward_finish_cpu(inputs, gradients, head, memory_of(head));
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cpu(const at::Tensor& grad_any,
                                                            const std::optional<at::Tensor>& grad_lse_any,
                                                            const at::Tensor& q_any, const at::Tensor& k_any,
                                                            const at::Tensor& v_any, const std::optional<at::Tensor>& mask_any,
                                                            const at::Tensor& out_any, const at::Tensor& lse_any,
                                                            double scale) {
  check(q_any, k_any, v_any, mask_any);
  check_backward(q_any, grad_any, grad_lse_any, out_any, lse_any);
  const at::Tensor q = as_rows(q_any), k = as_rows(k_any), v = as_rows(v_any), grad = as_rows(grad_any), out = as_rows(out_any);
  const at::Tensor lse = lse_any.contiguous(), dq = empty_rows(q), dk = empty_rows(k), dv = empty_rows(v);
  const at::Tensor grad_lse = grad_lse_any.has_value() ? grad_lse_any->contiguous() : at::Tensor();
  const Mask mask(mask_any, k.size(2));
  AttentionGradients gradients{};
  gradients.grad = head_rows(grad.const_data_ptr(), grad);
  gradients.out = head_rows(out.const_data_ptr(), out);
  gradients.lse = lse.const_data_ptr();
  gradients.grad_lse = grad_lse.defined() ? grad_lse.const_data_ptr() : nullptr;
  gradients.dq = head_rows(dq.mutable_data_ptr(), dq);
  gradients.dk = head_rows(dk.mutable_data_ptr(), dk);
  gradients.dv = head_rows(dv.mutable_data_ptr(), dv);
  run_backward(inputs_of(q, k, v, mask, scale), gradients);
  return {dq, dk, dv};
}

LDMKIT_BIND {
  module.def("cross_attention_forward_cpu", &forward_cpu, Unlocked());
  module.def("cross_attention_backward_cpu", &backward_cpu, Unlocked());
}

#endif

}  // namespace
}  // namespace ldmkit
