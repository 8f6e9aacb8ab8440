// GEGLU of a linear layer on the CPU: the library's matrix product in blocks of rows, gated while they are in the caches, so that the
// layer's output never goes through memory.
#ifndef LDMKIT_EMULATION

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "binding.h"
#include "geglu_slices.h"

namespace ldmkit {
namespace {

// oneDNN's linear layer, if this torch has it and it serves the dtype here. In fp32 F.linear takes MKL's, which runs at half the
// speed on AMD's processors; in bf16 it takes oneDNN's general product: 38 to 45 ms of a core where the linear layer took 35
// (2048 rows, 640 to 5120).
std::optional<c10::OperatorHandle> onednn_linear(at::ScalarType dtype) {
  static auto& dispatcher = c10::Dispatcher::singleton();
  static const auto op = dispatcher.findSchema({"mkldnn::_linear_pointwise", ""});
  static const bool serves_bf16 = [] {
    const auto supported = dispatcher.findSchema({"mkldnn::_is_mkldnn_bf16_supported", ""});
    return supported && supported->typed<bool()>().call();
  }();
  const bool serves = dtype == at::kFloat || (dtype == at::kBFloat16 && serves_bf16);
  return serves && at::globalContext().userEnabledMkldnn() ? op : std::nullopt;
}

// Rows of x times weight, plus bias: the library's product, on as many threads as there are to spare here.
at::Tensor product(const at::Tensor& x_RK, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const auto op = x_RK.numel() != 0 ? onednn_linear(x_RK.scalar_type()) : std::nullopt;
  if (!op) return at::linear(x_RK, weight, bias);
  torch::jit::Stack stack{x_RK, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), ""};
  op->callBoxed(stack);
  return stack[0].toTensor();
}

// A linear layer whose output is made, used and dropped in blocks of rows that fit the caches.
class Blocks {
 public:
  // fp16 is computed in fp32: processors without fp16 arithmetic multiply such matrices an element at a time.
  Blocks(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias)
      : n(weight.size(0) / 2),
        lead(x.sizes().slice(0, x.dim() - 1).vec()),
        rows(c10::multiply_integers(lead)),
        dtype(x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type()) {
    const auto fits = [&](const at::Tensor& t) { return t.is_cpu() && t.scalar_type() == x.scalar_type(); };
    TORCH_CHECK(fits(x) && weight.dim() == 2 && weight.size(0) == 2 * n && weight.size(1) == x.size(-1) && fits(weight) &&
                    (!bias || (bias->sizes() == weight.sizes().slice(0, 1) && fits(*bias))),
                "geglu_linear: weight and bias do not fit x");
    if (rows * n == 0) return;
    x_RK_ = x.size(-1) == 0 ? x.new_empty({rows, 0}) : as_rows(x);
    weight_ = weight.to(dtype).contiguous();
    if (bias) bias_ = bias->to(dtype);
  }

  at::Tensor empty(int64_t columns, const at::Tensor& like) const {
    std::vector<int64_t> shape = lead;
    shape.push_back(columns);
    return at::empty(shape, like.options());
  }

  // Runs work(begin, end, hidden) for all rows, in blocks: each on a thread of its own where there are enough of them.
  template <class Work>
  void for_each(const Work& work) const {
    constexpr int64_t kRows = 256;
    const int64_t block = rows >= kRows * at::get_num_threads() ? kRows : rows;
    at::parallel_for(0, (rows + block - 1) / block, 1, [&](int64_t first, int64_t last) {
      const at::AutoDispatchBelowADInplaceOrView no_autograd;
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = i * block, end = std::min(rows, begin + block);
        work(begin, end, product(x_RK_.slice(0, begin, end).to(dtype).contiguous(), weight_, bias_));
      }
    });
  }

  const int64_t n;
  const std::vector<int64_t> lead;
  const int64_t rows;
  const at::ScalarType dtype;  // of the arithmetic

 private:
  at::Tensor x_RK_, weight_;
  std::optional<at::Tensor> bias_;
};

// Runs `gate(output, slice)` over all slices of rows that are the output's, or become it once they are rounded.
template <class Gate>
void write_rows(const at::Tensor& output_RN, int64_t n, at::ScalarType dtype, bool stream, const Gate& gate) {
  const bool exact = output_RN.scalar_type() == dtype;
  const at::Tensor written = exact ? output_RN : at::empty(output_RN.sizes(), output_RN.options().dtype(dtype));
  void* data = written.mutable_data_ptr();
  for_each_slice(output_RN.size(0), n, exact && stream, [&](const GegluSlice& slice) { gate(data, slice); });
  if (!exact) output_RN.copy_(written);
}

std::tuple<at::Tensor, at::Tensor> forward_cpu(const at::Tensor& x, const at::Tensor& weight,
                                               const std::optional<at::Tensor>& bias, bool keep) {
  const Blocks blocks(x, weight, bias);
  const int64_t n = blocks.n;
  const at::Tensor y = blocks.empty(n, x), hidden = blocks.empty(keep ? 2 * n : 0, x);
  if (y.numel() == 0) return {y, hidden};
  const at::Tensor y_RN = y.view({blocks.rows, n}), hidden_RM = keep ? hidden.view({blocks.rows, 2 * n}) : hidden;
  const bool stream = place_large_output(y, n);
  if (keep) place_large_output(hidden, n);
  blocks.for_each([&](int64_t begin, int64_t end, const at::Tensor& block) {
    if (keep) hidden_RM.slice(0, begin, end).copy_(block);
    const void* data = block.const_data_ptr();
    write_rows(y_RN.slice(0, begin, end), n, blocks.dtype, stream, [&](void* out, const GegluSlice& slice) {
      geglu_forward_cpu(dtype_of(block), data, 2 * n, out, slice);
    });
  });
  return {y, hidden};
}

at::Tensor backward_cpu(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, const at::Tensor& hidden) {
  const Blocks blocks(x, weight, bias);
  const int64_t n = blocks.n;
  const at::Tensor grad_hidden = blocks.empty(2 * n, x);
  const auto fits = [&](const at::Tensor& t, int64_t numel) {
    return t.numel() == numel && t.is_cpu() && t.scalar_type() == x.scalar_type();
  };
  TORCH_CHECK(grad.size(-1) == n && fits(grad, grad_hidden.numel() / 2) &&
                  fits(hidden, hidden.size(-1) == 0 ? 0 : grad_hidden.numel()),
              "geglu_linear: the incoming gradient or hidden does not fit x");
  if (grad.numel() == 0) return grad_hidden;
  const at::Tensor grad_RN = as_rows(grad), out_RM = grad_hidden.view({blocks.rows, 2 * n});
  const bool stream = place_large_output(grad_hidden, n);
  if (hidden.numel() != 0) {
    const at::Tensor hidden_RM = as_rows(hidden);
    const void *grad_data = grad_RN.const_data_ptr(), *hidden_data = hidden_RM.const_data_ptr();
    void* out = out_RM.mutable_data_ptr();
    for_each_slice(blocks.rows, n, stream, [&, dtype = dtype_of(x)](const GegluSlice& slice) {
      geglu_backward_cpu(dtype, grad_data, grad_RN.stride(0), hidden_data, hidden_RM.stride(0), out, slice);
    });
    return grad_hidden;
  }
  blocks.for_each([&](int64_t begin, int64_t end, const at::Tensor& block) {
    const at::Tensor grad_block = grad_RN.slice(0, begin, end).to(blocks.dtype);
    const void *grad_data = grad_block.const_data_ptr(), *data = block.const_data_ptr();
    write_rows(out_RM.slice(0, begin, end), n, blocks.dtype, stream, [&](void* out, const GegluSlice& slice) {
      geglu_backward_cpu(dtype_of(block), grad_data, grad_block.stride(0), data, 2 * n, out, slice);
    });
  });
  return grad_hidden;
}

LDMKIT_BIND {
  module.def("geglu_linear_forward_cpu", &forward_cpu, Unlocked());
  module.def("geglu_linear_backward_cpu", &backward_cpu, Unlocked());
}

}  // namespace
}  // namespace ldmkit

#endif
