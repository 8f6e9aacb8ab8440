// Attention in fp64, row by row: the formulas, as they stand.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "cross_attention.h"

namespace ldmkit {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class Void>
auto* row_of(const HeadRows<Void>& rows, int64_t b, int64_t h, int64_t row) {
  using Number = std::conditional_t<std::is_const_v<Void>, const double, double>;
  return static_cast<Number*>(rows.data) + b * rows.batch + h * rows.head + row * rows.row;
}

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// scale q k^T + mask of one query; -inf for a hidden key, whatever it holds.
double score(const AttentionInputs& in, int64_t b, int64_t h, int64_t l, int64_t s) {
  double bias = 0;
  if (in.mask.data != nullptr) {
    const int64_t at = b * in.mask.batch + h * in.mask.head + l * in.mask.row + s;
    bias = in.mask.additive                             ? static_cast<const double*>(in.mask.data)[at]
           : static_cast<const bool*>(in.mask.data)[at] ? 0
                                                        : -kInfinity;
    if (bias == -kInfinity) return bias;
  }
  return dot(row_of(in.q, b, h, l), row_of(in.k, b, h, s), in.width) * in.scale + bias;
}

}  // namespace

void attention_forward_fp64(const AttentionInputs& in, const HeadRows<void>& out, double* lse, int64_t block_begin,
                            int64_t block_end) {
  const int64_t blocks = (in.queries + kAttentionBlockQueries - 1) / kAttentionBlockQueries;
  std::vector<double> scores(in.keys);
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t head = block / blocks, b = head / in.heads, h = head % in.heads,
                  begin = block % blocks * kAttentionBlockQueries;
    for (int64_t l = begin; l < std::min(in.queries, begin + kAttentionBlockQueries); ++l) {
      double top = -kInfinity, total = 0, *y = row_of(out, b, h, l);
      for (int64_t s = 0; s < in.keys; ++s) top = std::max(top, scores[s] = score(in, b, h, l, s));
      for (int64_t d = 0; d < in.width; ++d) y[d] = 0;
      for (int64_t s = 0; s < in.keys; ++s) {
        if (scores[s] == -kInfinity) continue;
        const double p = std::exp(scores[s] - top), *v = row_of(in.v, b, h, s);
        total += p;
        for (int64_t d = 0; d < in.width; ++d) y[d] += p * v[d];
      }
      for (int64_t d = 0; d < in.width && total != 0; ++d) y[d] /= total;
      lse[head * in.queries + l] = top + std::log(total);
    }
  }
}

void attention_backward_fp64(const AttentionInputs& in, const AttentionGradients& g, int64_t head) {
  const int64_t b = head / in.heads, h = head % in.heads, D = in.width;
  for (int64_t s = 0; s < in.keys; ++s) {
    for (int64_t d = 0; d < D; ++d) row_of(g.dk, b, h, s)[d] = row_of(g.dv, b, h, s)[d] = 0;
  }
  for (int64_t l = 0; l < in.queries; ++l) {
    const double *q = row_of(in.q, b, h, l), *grad = row_of(g.grad, b, h, l),
                 lse = static_cast<const double*>(g.lse)[head * in.queries + l];
    double* dq = row_of(g.dq, b, h, l);
    for (int64_t d = 0; d < D; ++d) dq[d] = 0;
    double delta = dot(grad, row_of(g.out, b, h, l), D);
    if (g.grad_lse != nullptr) delta -= static_cast<const double*>(g.grad_lse)[head * in.queries + l];
    for (int64_t s = 0; s < in.keys; ++s) {
      const double x = score(in, b, h, l, s);
      if (x == -kInfinity) continue;
      const double *k = row_of(in.k, b, h, s), *v = row_of(in.v, b, h, s), p = std::exp(x - lse);
      const double ds = p * (dot(grad, v, D) - delta) * in.scale;
      double *dk = row_of(g.dk, b, h, s), *dv = row_of(g.dv, b, h, s);
      for (int64_t d = 0; d < D; ++d) {
        dq[d] += ds * k[d];
        dk[d] += ds * q[d];
        dv[d] += p * grad[d];
      }
    }
  }
}

}  // namespace ldmkit
