"""Our CUDA kernels with one mistake each, which the emulated GPU must notice. A mistake is a change of the real source."""

import re
import shutil
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from ldmkit.errors import KernelError
from ldmkit.testing import emulation, emulation_build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++: install it")

VALUES = "wrong values"


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in csrc/`file`; then a call fails with a message like `caught`, or gives VALUES that are wrong."""

    name: str
    file: str
    old: str
    new: str
    caught: str
    call: str  # a function below
    exhaustive: bool = False


RACE = r"race: it (writes|reads) byte \d+ of .*, which thread .* (wrote|read) at .*, and nothing orders the two"
MUTANTS = [
    Mutant(
        "off-by-one bound",
        "geglu.cu",
        "; i < packs;",
        "; i <= packs;",
        r"thread \(42, 0, 0\): out of bounds: it reads 16 bytes, beginning 0 past the end of tensor argument 0",
        "geglu",
    ),
    Mutant(
        "a pointer's alignment not looked at",
        "geglu.cu",
        " && aligned(x)",
        "",
        "undefined behaviour: access to an address that is not aligned to 16 bytes",
        "geglu_offset",
    ),
    Mutant(
        "dropped barrier",
        "geglu_linear.cu",
        "    __syncthreads();  // slice",
        "    // slice",
        RACE,
        "geglu_linear",
    ),
    Mutant(
        "divergent barrier",
        "geglu_linear.cu",
        "    __syncthreads();  // slice",
        "    if (threadIdx.x < 64) __syncthreads();  // slice",
        f"divergent barrier: |{RACE}",
        "geglu_linear",
    ),
    Mutant(
        "a wait too few for cp.async",
        "geglu_linear.cu",
        "cp_async_wait<kStages - 2>",
        "cp_async_wait<kStages - 1>",
        "to which a cp.async is still under way",
        "geglu_linear",
    ),
    Mutant(
        "uninitialised shared memory",
        "geglu_linear.cu",
        "    cp_async<16>(stage + row * kPitch + piece * 16, source + column, inside);",
        "    if (inside) cp_async<16>(stage + row * kPitch + piece * 16, source + column);",
        VALUES,
        "geglu_linear",
    ),
    Mutant(
        "wrong mma fragment",
        "geglu_linear.cu",
        "{weight[j / 2][j % 2 * 2], weight[j / 2][j % 2 * 2 + 1]}",
        "{weight[j / 2][j % 2 * 2 + 1], weight[j / 2][j % 2 * 2]}",
        VALUES,
        "geglu_linear",
    ),
    Mutant(
        "wrong lane of an accumulator",
        "geglu_linear.cu",
        "8 * half + lane / 4)",
        "8 * half + lane % 4)",
        f"{RACE}|{VALUES}",
        "geglu_linear",
    ),
    Mutant(
        "one row of weight too many",
        "geglu_linear.cu",
        "inside = inside && output < task.n;",
        "inside = inside && output <= task.n;",
        "out of bounds: it reads 16 bytes",
        "geglu_linear",
    ),
    Mutant(
        "dropped barrier",
        "cross_attention_forward.cuh",
        "    __syncthreads();  // these keys",
        "    // these keys",
        RACE,
        "attention_to_many",
    ),
    Mutant(
        "no wait for cp.async",
        "cross_attention_forward.cuh",
        "  cp_async_wait<0>();\n  __syncthreads();\n\n  for (; tile",
        "  __syncthreads();\n\n  for (; tile",
        "to which a cp.async is still under way",
        "attention_to_few",
    ),
    Mutant(
        "one key too many",
        "cross_attention_forward.cuh",
        "0, rows, call.keys, call.D",
        "0, rows, call.keys + 1, call.D",
        "out of bounds: it reads 16 bytes, beginning 0 past the end of tensor argument [12]",
        "attention_to_few",
    ),
    Mutant(
        "wrong mma fragment",
        "cross_attention_forward.cuh",
        "score[0][n][i] = d[0][i];",
        "score[0][n][i] = d[0][i ^ 1];",
        VALUES,
        "attention_to_few",
    ),
    Mutant(
        "wrong mma fragment in memory",
        "cross_attention_fragments.cuh",
        "ldmatrix_x4_trans(b, row + 8 * n + lane() / 16 * 8);",
        "ldmatrix_x4(b, row + 8 * n + lane() / 16 * 8);",
        VALUES,
        "attention_to_few",
        exhaustive=True,
    ),
    Mutant(
        "dropped barrier",
        "cross_attention_backward.cuh",
        "    __syncthreads();  // these queries",
        "    // these queries",
        RACE,
        "gradient_of_attention",
        exhaustive=True,
    ),
    Mutant(
        "no wait for cp.async",
        "cross_attention_backward.cuh",
        "    cp_async_wait<0>();",
        "",
        "to which a cp.async is still under way",
        "gradient_of_attention",
        exhaustive=True,
    ),
    Mutant(
        "one query too many",
        "cross_attention_backward.cuh",
        "from, query < call.queries);",
        "from, query <= call.queries);",
        "out of bounds: it reads 4 bytes",
        "gradient_of_attention",
        exhaustive=True,
    ),
    Mutant(
        "wrong mma fragment",
        "cross_attention_backward.cuh",
        "p[0][n][i] = s[0][i],",
        "p[0][n][i] = s[0][i ^ 2],",
        VALUES,
        "gradient_of_attention",
        exhaustive=True,
    ),
]


# What a call gives, what is right in float64, and what plain torch gives in the same dtype.


def geglu(module):
    x_BN = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    return emulation.implementation(module, "geglu").forward(x_BN), *reference_geglu(x_BN)


def geglu_offset(module):
    x_BN = torch.randn(4 + 7 * 48, generator=torch.Generator().manual_seed(0))[1:337].view(7, 48)
    return emulation.implementation(module, "geglu").forward(x_BN), *reference_geglu(x_BN)


def reference_geglu(hidden, dtype=torch.float32):
    value, gate = hidden.double().chunk(2, dim=-1)
    right = value * F.gelu(gate)
    return right, right.to(dtype)


def geglu_linear(module):
    draw = torch.Generator().manual_seed(0)
    x_RK = torch.randn(20, 168, generator=draw).bfloat16()
    weight_NK = torch.randn(2 * 24, 168, generator=draw).bfloat16() / 8
    y, _ = emulation.implementation(module, "geglu_linear").forward(x_RK, weight_NK, None, False)
    return y, *reference_geglu(x_RK.double() @ weight_NK.double().T, torch.bfloat16)


def attention_inputs(L, S):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, rows, 40, generator=draw).half() for rows in (L, S, S)]


def attention(module, L, S):
    q, k, v = attention_inputs(L, S)
    out, _ = emulation.implementation(module, "cross_attention").forward(q, k, v, None, 40**-0.5)
    return out, F.scaled_dot_product_attention(q.double(), k.double(), v.double()), F.scaled_dot_product_attention(q, k, v)


def attention_to_few(module):
    return attention(module, 20, 77)


def attention_to_many(module):
    return attention(module, 20, 200)


def gradient_of_attention(module):
    q, k, v = attention_inputs(70, 17)
    (grad,) = attention_inputs(70, 0)[:1]
    implementation = emulation.implementation(module, "cross_attention")
    out, lse = implementation.forward(q, k, v, None, 40**-0.5)
    got = implementation.backward(grad, None, q, k, v, None, out, lse, 40**-0.5)

    def in_torch(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, grad.to(dtype))

    return tuple(torch.cat([x.flatten() for x in all_]) for all_ in (got, in_torch(torch.float64), in_torch(q.dtype)))


def outcome(csrc, call):
    """ "" for the right values, else VALUES or the message of the failure."""
    module = emulation.load(emulation_build.build(csrc=csrc))
    try:
        got, right, plain = globals()[call](module)
    except KernelError as error:
        return str(error)
    bound = 2 * (plain - right).abs().max() + 2 * torch.finfo(got.dtype).eps * right.abs().max()
    return "" if (got - right).abs().max() <= bound else VALUES


@pytest.mark.parametrize("call", sorted({mutant.call for mutant in MUTANTS}))
def test_the_kernels_themselves_pass(call):
    assert outcome(None, call) == ""


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, id=f"{m.file}: {m.name}", marks=pytest.mark.exhaustive if m.exhaustive else ()) for m in MUTANTS],
)
def test_a_mutant_is_caught(tmp_path, mutant):
    csrc = shutil.copytree(emulation_build.csrc_folder(), tmp_path / "csrc")
    text = (csrc / mutant.file).read_text()
    assert mutant.old in text, f"{mutant.file} has changed: {mutant.old!r} is no longer in it; make the mistake another way"
    (csrc / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    for file in csrc.glob("cross_attention*.cu"):  # the calls' width alone: others take long to compile
        file.write_text(re.sub(r"with_width<40, [\d, ]+>", "with_width<40>", file.read_text()))
    message = outcome(csrc, mutant.call)
    assert re.search(mutant.caught, message), message or "not caught"
