"""The contract's lines 21 to 23: the op inside torch - transforms, compiling, autocast, streams - and bad input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldmkit.errors import InputError, InputTypeError, KernelError
from ldmkit.testing.contract.core import Case, Property, Results, Subject, Trial, evaluate


def opcheck(t: Trial) -> None:
    """torch.library.opcheck of the raw forward and backward: schema, fake tensors, tracing with dynamic shapes."""
    forward = getattr(torch.ops.ldmkit, t.subject.op.name).default
    raw = t.subject.raw(t.problem)
    torch.library.opcheck(forward, raw)
    backward = getattr(torch.ops.ldmkit, f"{t.subject.op.name}_backward").default
    for arguments in _backward_arguments(t, forward, raw):
        torch.library.opcheck(backward, arguments)


def _backward_arguments(t: Trial, forward: Any, raw: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """What the differentiable function over the raw ops passes to the backward."""
    outputs, grads = forward(*raw), t.problem.grads
    if t.subject.op.name == "geglu":
        return [(*grads, *raw)]
    if t.subject.op.name == "geglu_linear":
        *inputs, _, backend = raw
        return [(*grads, *inputs, outputs[1], backend), (*grads, *inputs, forward(*inputs, False, backend)[1], backend)]
    if t.subject.op.name == "group_norm_silu":
        x, groups, weight, bias, _, silu, shift, residual, backend = raw
        return [(*grads, x, groups, weight, bias, silu, shift, residual, *outputs[1:], backend)]
    q, k, v, mask, scale, backend = raw
    return [(grads[0], grad_lse, q, k, v, mask, *outputs, scale, backend) for grad_lse in (None, *grads[1:])]


def transforms(t: Trial) -> None:
    """torch.func.grad, vmap and vmap(grad) give what a loop over items gives."""
    size = len(t.problem.grads[0])
    batched = {name: x for name, x in t.problem.tensors.items() if name in t.subject.op.batched}
    fixed = {name: x for name, x in t.problem.tensors.items() if name not in batched}
    mapped = {name: x.reshape(size, 1, *x.shape[1:]) for name, x in batched.items()}

    def call(items: dict[str, Tensor]) -> Tensor:
        return t.subject(**items, **fixed, **t.problem.options)[0]

    def loss(items: dict[str, Tensor]) -> Tensor:
        return call(items).square().sum()

    looped = torch.stack([call({name: x[i] for name, x in mapped.items()}) for i in range(size)])
    gradients = [torch.func.grad(loss)({name: x[i] for name, x in mapped.items()}) for i in range(size)]
    want = {name: torch.stack([gradient[name] for gradient in gradients]) for name in mapped}
    _agree(t, {"y": torch.func.vmap(call)(mapped)}, {"y": looped}, "vmap")
    _agree(t, torch.func.vmap(torch.func.grad(loss))(mapped), want, "vmap(grad)")
    through = torch.func.grad(lambda items: torch.func.vmap(loss)(items).sum())(mapped)
    _agree(t, through, want, "grad of vmap")


def _agree(t: Trial, got: Results, want: Results, what: str) -> None:
    """Close by the rounding of the dtype."""
    for name, expected in want.items():
        assert got[name].shape == expected.shape, f"{what}: {name} has shape {tuple(got[name].shape)}"
        size = float(expected.abs().max()) if expected.numel() else 0.0
        apart = float((got[name] - expected).abs().max()) if expected.numel() else 0.0
        limit = 16 * torch.finfo(expected.dtype).eps * size
        assert apart <= limit, f"{what}: {name} is {apart:.3g} off, more than 16 eps of its size, {limit:.3g}"


def further_derivatives(t: Trial) -> None:
    """Second and forward-mode derivatives are right, or refused with an error that says so."""
    names = list(t.problem.tensors)
    leaves = [t.problem.tensors[name].detach().clone().requires_grad_() for name in names]

    def call(*tensors: Tensor) -> Tensor:
        return t.subject(**dict(zip(names, tensors, strict=True)), **t.problem.options)[0]

    with _refused_clearly("second derivative"):
        (first,) = torch.autograd.grad(call(*leaves).sum(), leaves[:1], create_graph=True)
        torch.autograd.grad(first.square().sum(), leaves[:1])
        torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    with _refused_clearly("forward mode"):
        torch.func.jvp(lambda x: call(x, *(y.detach() for y in leaves[1:])), (leaves[0].detach(),), (leaves[0].detach(),))
        torch.autograd.gradcheck(call, leaves, fast_mode=True, check_forward_ad=True)


@contextlib.contextmanager
def _refused_clearly(what: str) -> Iterator[None]:
    try:
        yield
    except (KernelError, NotImplementedError, RuntimeError) as error:
        words = ("differentiate", "derivative for", "once_differentiable")
        told = isinstance(error, KernelError | NotImplementedError) or any(word in str(error) for word in words)
        if not told:
            raise AssertionError(f"{what}: neither right nor refused: {type(error).__name__}: {error}") from error


def compiled(t: Trial) -> None:
    """torch.compile(fullgraph=True) gives what eager gives, with static and with dynamic shapes, backward too."""
    other = t.build(seed=t.case["seed"] + 1, **LONGER[t.subject.op.name])
    for dynamic in (False, True):
        torch._dynamo.reset()
        graph = torch.compile(
            t.subject.call,
            fullgraph=True,
            dynamic=dynamic,
            backend="inductor" if t.subject.thorough else "aot_eager",
        )
        for problem in (t.problem, other):
            got, want = (evaluate(call, problem, t.subject.op.outputs) for call in (graph, t.subject))
            for name in want:
                assert got[name].dtype == want[name].dtype, f"{name}: compiled {got[name].dtype}, eager {want[name].dtype}"
                assert got[name].stride() == want[name].stride(), f"{name}: compiled and eager differ in strides"
            t.judge(problem).check_close(got, want, f"compiled with {'dynamic' if dynamic else 'static'} shapes")
    torch._dynamo.reset()


LONGER: dict[str, Case] = {
    "geglu": {"lead": (5, 3), "n": 9},
    "geglu_linear": {"lead": (5, 3), "n": 9},
    "group_norm_silu": {"batch": 3, "spatial": (4, 5)},
    "cross_attention": {"queries": 9, "keys": 11},
}
"""Other sizes for a graph that was traced with the first ones."""


def autocast(t: Trial) -> None:
    """Under autocast the result is that of inputs in the result's dtype, and inputs may differ in dtype."""
    device = t.subject.device
    with torch.autocast(device, dtype=torch.bfloat16):
        outputs = t.outputs()
        mixed = {name: x.bfloat16() if i == 0 else x for i, (name, x) in enumerate(t.problem.tensors.items())}
        of_mixed = t.outputs(replace(t.problem, tensors=mixed))
    for got, tensors in ((outputs, t.problem.tensors), (of_mixed, mixed)):
        problem = replace(t.problem, tensors=tensors).to(got[0].dtype)
        judge = t.judge(problem)
        for name, y in zip(t.subject.op.outputs, got, strict=False):
            assert y.dtype == judge.plain[name].dtype, f"{name} is {y.dtype} under autocast"
            judge.check_one(name, y, t.tally)


def bad_input(t: Trial) -> None:
    """A mistake in the arguments is an error with a name and a message, before anything runs."""
    for what, arguments in t.subject.op.mistakes(t.subject.device):
        try:
            t.subject(**arguments)
        except (InputError, InputTypeError):
            continue
        except (ValueError, TypeError) as error:
            if t.subject.backend is None:  # a stranger's callable may have errors of its own
                continue
            raise AssertionError(f"{what}: {type(error).__name__} is no error of ldmkit's: {error}") from error
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__} names no mistake: {error}") from error
        raise AssertionError(f"{what}: accepted")
    t.results()  # and the process goes on


def wrong_device(t: Trial) -> None:
    """Tensors that a backend cannot reach are refused by name."""
    arguments = {**t.problem.tensors, **t.problem.options}
    try:
        t.subject.call(**{name: x.to("meta") if isinstance(x, Tensor) else x for name, x in arguments.items()})
    except KernelError as error:
        if "meta" in str(error):
            return
        raise AssertionError(f"the error does not name the device: {error}") from error
    raise AssertionError("tensors on the meta device were accepted")


def graph_replay(t: Trial) -> None:
    """A CUDA graph, replayed over new numbers, gives what a call gives."""
    static = {name: x.clone() for name, x in t.problem.tensors.items()}
    problem = replace(t.problem, tensors=static)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            t.outputs(problem)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = t.outputs(problem)
    for seed in (1, 2):
        new = t.build(seed=t.case["seed"] + seed)
        for name, x in new.tensors.items():
            static[name].copy_(x)
        graph.replay()
        want = dict(zip(t.subject.op.outputs, t.outputs(new), strict=False))
        t.check_same(dict(zip(want, captured, strict=True)), want, "replayed from a CUDA graph")


def other_stream(t: Trial) -> None:
    """On another stream a call waits for what that stream was given before."""
    want = t.results()
    late = {name: torch.zeros_like(x) for name, x in t.problem.tensors.items()}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name, x in t.problem.tensors.items():
            late[name].copy_(x)
        got = t.results(replace(t.problem, tensors=late))
    stream.synchronize()
    t.check_same(got, want, "on another stream")


def second_device(t: Trial) -> None:
    """Tensors of the second device are served there, while the first is the current one."""
    want = t.results()
    there = t.subject.op.build("cuda:1", **t.case)
    t.check_same({name: r.to("cuda:0") for name, r in t.results(there).items()}, want, "on the second device")


# ------------------------------------------------------------------------------------------------------------------- helpers


def _fixed(most: int | None = None, **changes: Any) -> Callable[[Subject], Iterable[Case]]:
    """Cases of an op's ordinary size, with all optional arguments and without: the first `most` of them."""

    def cases(subject: Subject) -> Iterable[Case]:
        for case in ORDINARY[subject.op.name][: 1 if subject.tiny else most]:
            full = {**subject.op.many(), **case}
            yield {**full, **{name: value for name, value in changes.items() if name in full}}

    return cases


ORDINARY: dict[str, list[Case]] = {
    "geglu": [{"lead": (2, 3), "n": 5}],
    "geglu_linear": [{"lead": (2, 3), "k": 8, "n": 5}, {"lead": (2, 3), "k": 8, "n": 5, "bias": False}],
    "group_norm_silu": [
        {"batch": 2, "groups": 2, "per_group": 3, "spatial": (2, 3), "shift": True, "residual": True},
        {"batch": 2, "groups": 2, "per_group": 3, "spatial": (2, 3), "affine": False, "layout": "channels-last"},
    ],
    "cross_attention": [
        {"batch": 2, "heads": 2, "queries": 5, "keys": 7, "dim": 8, "mask": "keys"},
        {"batch": 2, "heads": 2, "queries": 5, "keys": 7, "dim": 8, "lse": False},
    ],
}


DOUBLE: Case = {"dtype": "float64", "layout": "dense"}
"""Derivatives of derivatives are compared to finite differences; plain torch has none in forward mode for channels-last."""


def _no_raw_op(subject: Subject) -> str | None:
    if subject.backend == "reference":
        return "the reference is plain torch, without an op of its own"
    return "a callable that is no backend of ldmkit's has no raw op" if subject.backend is None else None


def _any_device(subject: Subject) -> str | None:
    return "it serves every device" if subject.backend in (None, "reference") else None


def _gpu(devices: int = 1) -> Callable[[Subject], str | None]:
    def absent(subject: Subject) -> str | None:
        if subject.device != "cuda":
            return "needs a GPU"
        return None if torch.cuda.device_count() >= devices else f"needs a GPU: {devices} of them"

    return absent


PROPERTIES = (
    Property(21, "opcheck of the raw ops", opcheck, fixed=_fixed(), absent=_no_raw_op),
    Property(21, "torch.func: grad, vmap, vmap(grad)", transforms, fixed=_fixed(mask=None)),
    Property(21, "second and forward derivatives right or refused", further_derivatives, fixed=_fixed(**DOUBLE)),
    Property(21, "torch.compile, static and dynamic shapes", compiled, fixed=_fixed(1)),
    Property(21, "autocast", autocast, fixed=_fixed()),
    Property(22, "CUDA graph replay", graph_replay, fixed=_fixed(), absent=_gpu()),
    Property(22, "another stream", other_stream, fixed=_fixed(), absent=_gpu()),
    Property(22, "second device", second_device, fixed=_fixed(), absent=_gpu(2)),
    Property(23, "bad input is named", bad_input, fixed=_fixed()),
    Property(23, "tensors elsewhere are refused", wrong_device, fixed=_fixed(), absent=_any_device),
)
