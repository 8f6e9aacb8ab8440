"""Kernels that are wrong on purpose, one for each known trap and at least one for each property of the contract.

`MUTANTS[op]` maps the name of a property to the callables that it must reject. All are plain torch, with an op's public
signature.
"""

import math

import torch
import torch.nn.functional as F

from ldmkit.kernels import cross_attention as good_cross_attention
from ldmkit.kernels import geglu as good_geglu
from ldmkit.kernels import group_norm_silu as good_group_norm_silu
from ldmkit.kernels.backends import Implementation

INF = math.inf
MUTANTS = {"geglu": {}, "geglu_linear": {}, "group_norm_silu": {}, "cross_attention": {}}


def caught_by(*names, op):
    """Enters a mutant under the properties that must reject it."""

    def enter(mutant):
        for name in names:
            MUTANTS[op].setdefault(name, []).append(mutant)
        return mutant

    return enter


def halves(x):
    return x.chunk(2, dim=-1)


def function_of(forward, backward):
    """A callable with a backward of its own; both take and give tensors, and forward's inputs are what is saved."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return forward(*inputs)

        @staticmethod
        def backward(ctx, *grads):
            return backward(*grads, *ctx.saved_tensors)

    return Function.apply


# ----------------------------------------------------------------------------------------------------------------------- GEGLU


@caught_by("GELU is the exact one", op="geglu")
def tanh_gelu(x):
    value, gate = halves(x)
    return value * F.gelu(gate, approximate="tanh")


@caught_by("GELU is the exact one", "linear in the first half", op="geglu")
def swapped_halves(x):
    gate, value = halves(x)
    return value * F.gelu(gate)


@caught_by("any strides and offsets", "64-bit strides", op="geglu")
def flat_indexing(x):
    """Reads memory from the first element on, as if rows lay side by side."""
    flat = x.detach().new_tensor([]).set_(x.untyped_storage(), x.storage_offset(), (0,), (1,))
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    dense = flat.as_strided((min(room, x.numel()),), (1,))
    dense = F.pad(dense, (0, x.numel() - len(dense))).view(x.shape)
    return good_geglu(x + (dense - x).detach(), backend="reference")


@caught_by("64-bit strides", op="geglu")
def indices_of_32_bits(x):
    wrapped = [stride % 2**31 for stride in x.stride()]
    return good_geglu(x + (x.detach().as_strided(x.shape, wrapped) - x).detach(), backend="reference")


def _geglu_gradient(grad, x):
    value, gate = halves(x)
    phi = torch.exp(-gate.square() / 2) / math.sqrt(2 * math.pi)
    cdf = torch.special.ndtr(gate)
    return torch.cat([grad * gate * cdf, grad * value * (cdf + gate * phi)], dim=-1)


@caught_by("nothing modified, backward twice", op="geglu")
def backward_in_place(x):
    return function_of(lambda x: good_geglu(x, backend="reference"), lambda grad, x: x.copy_(_geglu_gradient(grad, x)).clone())(
        x
    )


@caught_by("nothing modified, backward twice", op="geglu")
def modified_input(x):
    y = good_geglu(x, backend="reference")
    with torch.no_grad():
        x.detach()[..., : x.shape[-1] // 2].mul_(2)
    return y


@caught_by("guard bands, every element written", op="geglu")
def unwritten_last_element(x):
    def forward(x):
        y = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype)
        y.view(-1)[:-1] = good_geglu(x, backend="reference").reshape(-1)[:-1]
        return y

    return function_of(forward, _geglu_gradient)(x)


@caught_by("guard bands, every element written", op="geglu")
def written_past_the_end(x):
    def forward(x):
        y = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype)
        y.copy_(good_geglu(x, backend="reference"))
        if y.untyped_storage().nbytes() > y.nbytes:  # inside guard bands: anywhere else this would hurt our own process
            y.as_strided((1,), (1,), y.storage_offset() + y.numel()).zero_()
        return y

    return function_of(forward, _geglu_gradient)(x)


@caught_by("no bias", op="geglu")
def rounded_towards_zero(x):
    y = good_geglu(x.double(), backend="reference")
    rounded = y.to(x.dtype)
    smaller = torch.nextafter(rounded, torch.zeros_like(rounded))
    return torch.where(rounded.double().abs() > y.abs(), smaller, rounded)


@caught_by("NaN and Inf are not hidden", op="geglu")
def hidden_nan(x):
    return good_geglu(x.nan_to_num(0.0), backend="reference")


@caught_by("NaN and Inf stay in their group or row", op="geglu")
def nan_everywhere(x):
    return good_geglu(x, backend="reference") + 0 * x.sum()


@caught_by("finite at extremes", op="geglu")
def overflowing_square(x):
    value, gate = halves(x)
    return value * (gate.square() / gate) * torch.special.ndtr(gate)


@caught_by("the bound, over shapes, dtypes, layouts, sizes", "agrees with the reference", op="geglu")
def in_half_precision(x):
    return good_geglu(x.bfloat16(), backend="reference").to(x.dtype)


@caught_by("named sizes: none, one, odd, the models'", op="geglu")
def rows_of_multiples_of_8(x):
    n = x.shape[-1] // 2
    return F.pad(good_geglu(x, backend="reference")[..., : n // 8 * 8], (0, n % 8))


@caught_by("torch.compile, static and dynamic shapes", op="geglu")
def double_when_compiled(x):
    y = good_geglu(x, backend="reference")
    return y.double() if torch.compiler.is_compiling() else y


@caught_by("batch-invariant to the bit, on any threads", op="geglu")
def split_by_batch_size(x):
    y = good_geglu(x.double(), backend="reference")
    return y.to(x.dtype) if x.shape[0] > 1 else good_geglu(x, backend="reference") * (1 + torch.finfo(x.dtype).eps)


@caught_by("permuting the batch permutes the results", op="geglu")
def first_item_is_special(x):
    y = good_geglu(x, backend="reference")
    return torch.cat([y[:1] * (1 + torch.finfo(x.dtype).eps), y[1:]])


@caught_by("the same bits from run to run", op="geglu")
def any_order(x):
    y = good_geglu(x, backend="reference")
    return y * (1 + torch.finfo(x.dtype).eps * torch.randint(0, 2, y.shape))


@caught_by("gradcheck in float64", op="geglu")
def gradient_without_density(x):
    def backward(grad, x):
        value, gate = halves(x)
        return torch.cat([grad * F.gelu(gate), grad * value * torch.special.ndtr(gate)], dim=-1)

    return function_of(lambda x: good_geglu(x, backend="reference"), backward)(x)


@caught_by("backward is linear in the incoming gradient", op="geglu")
def clipped_gradient(x):
    return function_of(lambda x: good_geglu(x, backend="reference"), lambda g, x: _geglu_gradient(g.clamp(-1, 1), x))(x)


@caught_by("second and forward derivatives right or refused", op="geglu")
def gradient_taken_for_a_constant(x):
    return function_of(lambda x: good_geglu(x, backend="reference"), lambda g, x: _geglu_gradient(g, x.detach()))(x)


@caught_by("torch.func: grad, vmap, vmap(grad)", op="geglu")
def no_vmap(x):
    return function_of(lambda x: good_geglu(x, backend="reference"), _geglu_gradient)(x)


@caught_by("autocast", op="geglu")
def autocast_to_half_the_accuracy(x):
    y = good_geglu(x, backend="reference")
    return y.bfloat16().to(y.dtype) if torch.is_autocast_enabled("cpu") else y


@caught_by("bad input is named", op="geglu")
def drops_an_odd_column(x):
    return good_geglu(x[..., : x.shape[-1] // 2 * 2].float(), backend="reference").to(x.dtype)


# -------------------------------------------------------------------------------------------------------- GEGLU and its product


def projected(x, weight, bias):
    return F.linear(x, weight, bias)


@caught_by("linear in the first half", op="geglu_linear")
def interleaved_columns(x, weight, bias=None):
    hidden = projected(x, weight, bias)
    return hidden[..., ::2] * F.gelu(hidden[..., 1::2])


@caught_by("a bias is added to the projection", op="geglu_linear")
def bias_of_the_value_only(x, weight, bias=None):
    value, gate = halves(projected(x, weight, None))
    return (value if bias is None else value + bias[: value.shape[-1]]) * F.gelu(gate)


@caught_by("the bound, over shapes, dtypes, layouts, sizes", op="geglu_linear")
def partial_sums_in_half_precision(x, weight, bias=None):
    hidden = sum(x[..., i, None] * weight[:, i] for i in range(x.shape[-1]))
    return good_geglu(hidden if bias is None else hidden + bias, backend="reference")


# ------------------------------------------------------------------------------------------------------------- GroupNorm + SiLU


def norm(mutate, x, num_groups, weight=None, bias=None, eps=1e-5, *, silu=True, shift=None, residual=None):
    """GroupNorm in float32 and by its formula, with `mutate(h_NG, eps) -> (mean, rstd)` for statistics."""
    pixels = (1,) * (x.dim() - 2)
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    h = h if shift is None else h + shift.to(wide).reshape(*shift.shape, *pixels)
    h = h if residual is None else h + residual.to(wide)
    if x.numel():
        h_NG = h.reshape(x.shape[0], num_groups, -1)
        mean, rstd = mutate(h_NG, eps)
        h = ((h_NG - mean) * rstd).reshape(x.shape)
    h = h if weight is None else h * weight.to(wide).reshape(-1, *pixels)
    h = h if bias is None else h + bias.to(wide).reshape(-1, *pixels)
    y = (F.silu(h) if silu else h).to(x.dtype)
    return torch.empty_like(x).copy_(y) if not x.is_contiguous() else y


def two_passes(h_NG, eps):
    return h_NG.mean(2, keepdim=True), (h_NG.var(2, keepdim=True, correction=0) + eps).rsqrt()


@caught_by("finite at extremes", "shift invariance", op="group_norm_silu")
def variance_from_squares(x, num_groups, *args, **kwargs):
    def statistics(h_NG, eps):
        mean = h_NG.mean(2, keepdim=True)
        return mean, (h_NG.square().mean(2, keepdim=True) - mean.square() + eps).rsqrt()

    return norm(statistics, x, num_groups, *args, **kwargs)


@caught_by("no bias", op="group_norm_silu")
def statistics_in_the_inputs_dtype(x, num_groups, *args, **kwargs):
    return norm(lambda h, eps: (s.to(x.dtype).to(h.dtype) for s in two_passes(h, eps)), x, num_groups, *args, **kwargs)


@caught_by("scale invariance", op="group_norm_silu")
def eps_of_its_own(x, num_groups, *args, **kwargs):
    return norm(lambda h_NG, eps: two_passes(h_NG, 1e-5), x, num_groups, *args, **kwargs)


@caught_by("the bound, over shapes, dtypes, layouts, sizes", op="group_norm_silu")
def eps_added_to_the_deviation(x, num_groups, *args, **kwargs):
    def statistics(h_NG, eps):
        return h_NG.mean(2, keepdim=True), 1 / (h_NG.var(2, keepdim=True, correction=0).sqrt() + eps**0.5)

    return norm(statistics, x, num_groups, *args, **kwargs)


@caught_by("LayerNorm and InstanceNorm", op="group_norm_silu")
def unbiased_variance(x, num_groups, *args, **kwargs):
    def statistics(h_NG, eps):
        return h_NG.mean(2, keepdim=True), (h_NG.var(2, keepdim=True) + eps).rsqrt()

    return norm(statistics, x, num_groups, *args, **kwargs)


@caught_by("channels in any order", op="group_norm_silu")
def mean_of_the_first_half(x, num_groups, *args, **kwargs):
    def statistics(h_NG, eps):
        return two_passes(h_NG[..., : max(1, h_NG.shape[2] // 2)], eps)

    return norm(statistics, x, num_groups, *args, **kwargs)


@caught_by("a group's gradient sums to 0", op="group_norm_silu")
def mean_taken_for_a_constant(x, num_groups, *args, **kwargs):
    def statistics(h_NG, eps):
        mean, rstd = two_passes(h_NG, eps)
        return mean.detach(), rstd

    return norm(statistics, x, num_groups, *args, **kwargs)


@caught_by("fusions equal their composition", op="group_norm_silu")
def residual_added_afterwards(x, num_groups, *args, residual=None, **kwargs):
    y = norm(two_passes, x, num_groups, *args, **kwargs)
    return y if residual is None else y + residual


@caught_by("memory formats agree and are kept", op="group_norm_silu")
def always_contiguous(x, num_groups, *args, **kwargs):
    return good_group_norm_silu(x, num_groups, *args, **kwargs, backend="reference").contiguous()


@caught_by("NaN and Inf stay in their group or row", op="group_norm_silu")
def nan_in_all_groups(x, num_groups, *args, **kwargs):
    def statistics(h_NG, eps):
        mean, rstd = two_passes(h_NG, eps)
        return mean + 0 * h_NG.sum((1, 2), keepdim=True), rstd

    return norm(statistics, x, num_groups, *args, **kwargs)


@caught_by("the same bits from run to run", op="group_norm_silu")
def sums_in_any_order(x, num_groups, *args, **kwargs):
    """As atomics add."""

    def statistics(h_NG, eps):
        return two_passes(h_NG[..., torch.randperm(h_NG.shape[2])], eps)

    return norm(statistics, x, num_groups, *args, **kwargs)


class AffineInHalf(torch.autograd.Function):
    """h w + b, whose weight gradients are added up in the dtype itself, pixel after pixel."""

    @staticmethod
    def forward(ctx, h, weight, bias):
        ctx.save_for_backward(h, weight)
        shape = (-1, *(1,) * (h.dim() - 2))
        return h * weight.reshape(shape) + bias.reshape(shape)

    @staticmethod
    def backward(ctx, grad):
        h, weight = ctx.saved_tensors
        shape = (-1, *(1,) * (h.dim() - 2))

        def added(terms):
            flat = terms.transpose(0, 1).reshape(terms.shape[1], -1)
            total = torch.zeros_like(flat[:, 0])
            for pixel in flat.unbind(1):
                total = total + pixel
            return total

        return grad * weight.reshape(shape), added(grad * h), added(grad)


@caught_by("named sizes: none, one, odd, the models'", op="group_norm_silu")
def weight_gradients_added_in_half(x, num_groups, weight=None, bias=None, eps=1e-5, *, silu=True, **fused):
    if weight is None or not x.numel() or x.dtype.itemsize > 2:
        return good_group_norm_silu(x, num_groups, weight, bias, eps, silu=silu, backend="reference", **fused)
    h = norm(two_passes, x, num_groups, eps=eps, silu=False, **fused)
    y = AffineInHalf.apply(h, weight, bias)
    return F.silu(y) if silu else y


@caught_by("torch.compile, static and dynamic shapes", op="group_norm_silu")
def eps_in_double_when_compiled(x, num_groups, *args, **kwargs):
    def statistics(h_NG, eps):
        if torch.compiler.is_compiling():
            h_NG = h_NG + torch.full((1,), eps, dtype=torch.float64)
        return two_passes(h_NG, eps)

    y = norm(statistics, x, num_groups, *args, **kwargs)
    return y.double() if torch.compiler.is_compiling() else y


# ------------------------------------------------------------------------------------------------------------------- attention


def attention(mutate, q, k, v, *, mask=None, scale=None, return_lse=False):
    """Attention in float32 and by its formula, with `mutate(scores) -> (weights, log-sum-exp)`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        mask = mask[:, None, None, :] if mask.dim() == 2 else mask
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask
    weights, lse = mutate(scores)
    out = (weights @ v.to(wide)).to(q.dtype)
    return (out, lse) if return_lse else out


def safe(scores):
    dead = (scores == -INF).all(-1, keepdim=True)
    live = scores.masked_fill(dead, 0.0)
    return live.softmax(-1).masked_fill(dead, 0.0), live.logsumexp(-1).masked_fill(dead[..., 0], -INF)


@caught_by("rows without keys are 0", op="cross_attention")
def nan_without_keys(q, k, v, **kwargs):
    return attention(lambda s: (s.softmax(-1), s.logsumexp(-1)), q, k, v, **kwargs)


@caught_by("hidden keys change nothing", op="cross_attention")
def hidden_nan_leaks(q, k, v, **kwargs):
    return attention(safe, q, k, v, **kwargs)


@caught_by("scores past +-88", op="cross_attention")
def no_maximum_taken_off(q, k, v, **kwargs):
    def weights(scores):
        e = scores.exp()
        total = e.sum(-1, keepdim=True)
        return e / total.masked_fill(total == 0, 1.0), total[..., 0].log()

    return attention(weights, q, k, v, **kwargs)


@caught_by("finite at extremes", op="cross_attention")
def infinite_for_large_scores(q, k, v, **kwargs):
    return attention(lambda s: safe(s.square() / s), q, k, v, **kwargs)


@caught_by("softmax shift invariance", op="cross_attention")
def clamped_scores(q, k, v, **kwargs):
    return attention(lambda s: safe(s.clamp(max=2.5)), q, k, v, **kwargs)


@caught_by("keys in any order", op="cross_attention")
def causal_by_mistake(q, k, v, **kwargs):
    def weights(scores):
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return safe(scores.masked_fill(later, -INF))

    return attention(weights, q, k, v, **kwargs)


@caught_by("inside the hull of the values", op="cross_attention")
def weights_that_sum_past_1(q, k, v, **kwargs):
    def weights(scores):
        p, lse = safe(scores)
        return p * 1.5, lse

    return attention(weights, q, k, v, **kwargs)


@caught_by("contexts merge by log-sum-exp", op="cross_attention")
def log_sum_exp_to_base_2(q, k, v, **kwargs):
    def weights(scores):
        p, lse = safe(scores)
        return p, lse / math.log(2)

    return attention(weights, q, k, v, **kwargs)


@caught_by("named sizes: none, one, odd, the models'", op="cross_attention")
def padded_head_dimension_leaks(q, k, v, *, scale=None, **kwargs):
    """Tiles of 16: what lies past a row of q meets what lies past a row of k."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (F.pad(x, (0, -x.shape[-1] % 16), value=0.5) for x in (q, k))
    return good_cross_attention(q, k, F.pad(v, (0, q.shape[-1] - v.shape[-1])), scale=scale, **kwargs)


@caught_by("the bound, over shapes, dtypes, layouts, sizes", op="cross_attention")
def padded_keys_leak(q, k, v, **kwargs):
    def weights(scores):
        padding = -scores.shape[-1] % 16
        p, lse = safe(F.pad(scores, (0, padding)))
        return p[..., : scores.shape[-1]], lse

    return attention(weights, q, k, v, **kwargs)


@caught_by("the bound, over shapes, dtypes, layouts, sizes", op="cross_attention")
def scores_in_the_inputs_dtype(q, k, v, **kwargs):
    return attention(lambda s: safe(s.to(q.dtype).to(s.dtype)), q, k, v, **kwargs)


@caught_by("the bound, over shapes, dtypes, layouts, sizes", op="cross_attention")
def mask_upside_down(q, k, v, *, mask=None, **kwargs):
    mask = ~mask if mask is not None and mask.dtype == torch.bool else mask
    return attention(safe, q, k, v, mask=mask, **kwargs)


@caught_by("NaN and Inf stay in their group or row", op="cross_attention")
def nan_in_all_rows(q, k, v, **kwargs):
    return attention(
        lambda s: safe(s + 0 * s.sum(2, keepdim=True).nan_to_num(0.0, INF, -INF)), q + 0 * q.sum(2, True), k, v, **kwargs
    )


@caught_by("the same bits from run to run", op="cross_attention")
def keys_added_in_any_order(q, k, v, *, mask=None, **kwargs):
    order = torch.randperm(k.shape[2])
    mask = None if mask is None else mask[..., order]
    return attention(safe, q, k[:, :, order], v[:, :, order], mask=mask, **kwargs)


# ------------------------------------------------------------------------------------------------------------- whole backends


def _rows_in_columns(x):
    """Strides that the op's fake does not promise."""
    return good_geglu(x, backend="reference").mT.contiguous().mT


class Careless(Implementation):
    """Takes every tensor from anywhere."""

    def refuses(self, arguments):
        return None


BROKEN_BACKENDS = {
    "opcheck of the raw ops": Implementation(forward=_rows_in_columns, backward=_geglu_gradient, device="cpu"),
    "tensors elsewhere are refused": Careless(forward=good_geglu, backward=_geglu_gradient, device="cpu"),
}
"""By the property that must reject them, backends of geglu."""
