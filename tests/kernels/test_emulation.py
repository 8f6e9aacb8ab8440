"""The emulated GPU does what CUDA's documents say, and notices what a GPU would not tell."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ldmkit.testing import emulation
from ldmkit.testing.emulation_build import build_library, csrc_folder

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++: install it")

PROBES = Path(__file__).resolve().parent / "emulated" / "probes.cu"


class Probes:
    """emulated/probes.cu, compiled one way: probes.name(*arguments) launches and raises on failure."""

    def __init__(self, **how):
        self.path = build_library(PROBES, **how)
        self.library = ctypes.CDLL(str(self.path))
        self.library.ldmkit_emulation_error.restype = ctypes.c_char_p

    def schedule(self, name, seed=0):
        self.library.ldmkit_emulation_schedule(emulation.SCHEDULES.index(name), ctypes.c_uint64(seed))

    def __getattr__(self, name):
        def launch(*arguments, read_only=()):
            for number, argument in enumerate(arguments):
                if isinstance(argument, torch.Tensor):
                    writable = number not in read_only
                    emulation.map_memory(self.library, argument, f"argument {number}", writable=writable)
            passed = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
            code = getattr(self.library, f"probe_{name}")(*passed)
            self.library.ldmkit_emulation_unmap(None)
            if code != 0:
                raise RuntimeError(emulation.name_lines(self.library.ldmkit_emulation_error(code).decode(), self.path))

        return launch


@pytest.fixture(scope="module")
def probes():
    return Probes()


@pytest.fixture(scope="module")
def plain():
    return Probes(sanitize=False)


@pytest.fixture(scope="module", params=["sanitized", "plain", "ucontext"])
def any_probes(request, probes):
    """Every way to compile; "ucontext" is how fibers are switched where there is no assembly for the processor."""
    if request.param == "sanitized":
        return probes
    return request.getfixturevalue("plain") if request.param == "plain" else Probes(flags=["-DLDMKIT_EMULATION_UCONTEXT"])


@pytest.fixture(params=emulation.SCHEDULES)
def schedule(request, any_probes):
    any_probes.schedule(request.param, seed=7)
    yield request.param
    any_probes.schedule("forward")


# ----------------------------------------------------------------------------------------------------------- what CUDA promises


def test_shuffles_votes_and_reductions(any_probes, schedule):
    out = torch.empty(15, 64, dtype=torch.int32)
    any_probes.warp_functions(out)
    value = np.arange(64) ** 2 % 101
    lane, warp = np.arange(64) % 32, np.arange(64) // 32
    by_warp = value.reshape(2, 32)

    def ballot(bits):
        return (bits.astype(np.uint64) << np.arange(bits.shape[-1], dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32)

    def from_lane(source, inside=True):
        return np.where(inside, value[32 * warp + np.where(inside, source, 0)], value)

    half = np.repeat(by_warp[:, ::2].sum(1), 32)
    tiles = ballot((value % 3 == 0).reshape(8, 8))
    expected = [
        from_lane(3),
        from_lane(lane // 8 * 8 + (lane + 1) % 8),
        from_lane(lane ^ 5),
        from_lane(lane + 3, lane + 3 < 32),
        from_lane(lane - 3, lane % 16 >= 3),
        np.repeat(ballot(by_warp % 3 == 0), 32),
        np.repeat((by_warp > 97).any(1), 32),
        np.repeat((by_warp < 100).all(1), 32),
        np.repeat(by_warp.sum(1), 32),
        np.repeat(by_warp.max(1), 32),
        np.repeat(np.bitwise_xor.reduce(by_warp, 1), 32),
        np.where(lane % 2 == 0, half, -1),
        from_lane(lane + 2, lane % 8 < 6),
        np.repeat(tiles, 8),
        np.full(64, (value > 50).sum()),
    ]
    for row, (got, wanted) in enumerate(zip(out.numpy(), expected, strict=True)):
        np.testing.assert_array_equal(got, wanted, err_msg=f"row {row}")


def test_barriers_atomics_and_the_last_block(any_probes, schedule):
    numbers = torch.randint(-1000, 1000, (6, 128), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    partial, total = torch.zeros(6, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    any_probes.sum_all(numbers, partial, torch.zeros(1, dtype=torch.int32), total, 6, True, read_only=[0])
    assert torch.equal(partial, numbers.sum(1, dtype=torch.int32))
    assert total == numbers.sum()


def fragments(shape, strides, values):
    """Which (row, column) each lane's values are, by a CuTe layout: ((4, 8), (2, ...)) strides over the column-major matrix."""
    rows = shape[0]
    lanes = np.arange(32) % 4 * strides[0] + np.arange(32) // 4 * strides[1]
    offsets = np.zeros(1, dtype=int)
    for stride in reversed(values):
        offsets = np.add.outer(offsets, np.array([0, stride])).ravel()
    index = np.add.outer(lanes, offsets)
    return index % rows, index // rows


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_mma_has_the_layouts_that_cutlass_has(any_probes, kind):
    """cute/atom/mma_traits_sm80.hpp: SM80_16x8x16_F32F16F16F32_TN, SM80_16x8x8_F32TF32TF32F32_TN. Small integers are exact."""
    if kind == torch.float32:
        a_MK, b_NK = fragments((16, 8), (16, 1), (8, 64)), fragments((8, 8), (8, 1), (32,))
    else:
        a_MK, b_NK = fragments((16, 16), (32, 1), (16, 8, 128)), fragments((8, 16), (16, 1), (8, 64))
    d_MN = fragments((16, 8), (32, 1), (16, 8))
    draw = torch.Generator().manual_seed(0)
    depth = 8 if kind == torch.float32 else 16
    a, b, c = (torch.randint(-8, 9, shape, generator=draw).float() for shape in ((16, depth), (8, depth), (16, 8)))
    registers = [matrix[place].to(kind).contiguous().view(torch.int32) for matrix, place in ((a, a_MK), (b, b_NK))]
    if kind == torch.float32:
        registers = [r | torch.randint(0, 1 << 13, r.shape, generator=draw, dtype=torch.int32) for r in registers]
    d = c[d_MN].contiguous()
    any_probes.multiply([torch.float16, torch.bfloat16, torch.float32].index(kind), *registers, d, read_only=[1, 2])
    assert torch.equal(d, (c + a @ b.T)[d_MN])


def test_ldmatrix(any_probes):
    rows = torch.randint(-(1 << 15), 1 << 15, (4, 8, 8), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    out = torch.empty(4, 32, 4, dtype=torch.int32)
    any_probes.load_fragments(rows, out, read_only=[0])
    straight = rows.view(torch.int32).reshape(4, 32).T
    turned = rows.transpose(1, 2).contiguous().view(torch.int32).reshape(4, 32).T
    assert torch.equal(out[0], straight)
    assert torch.equal(out[1], turned)
    assert torch.equal(out[2, :, :2], straight[:, :2])
    assert torch.equal(out[3, :, :2], turned[:, :2])


@pytest.mark.parametrize(("waits", "arrived"), [(0, 0), (1, 128), (2, 192), (3, 224)])
def test_copies_arrive_when_they_are_waited_for(plain, waits, arrived):
    x, out = torch.randn(128), torch.empty(224)
    plain.copy_groups(x, out, 20, waits, read_only=[0])
    parts = [torch.where(torch.arange(size) < 20 * size // 32, x[:size], 0.0) for size in (128, 64, 32)]
    assert torch.equal(out[:arrived], torch.cat(parts)[:arrived])
    assert out[arrived:].isnan().all()


def test_a_copy_that_is_not_waited_for_cannot_be_read(probes):
    x, out = torch.randn(128), torch.empty(224)
    probes.copy_groups(x, out, 32, 3, read_only=[0])
    with pytest.raises(
        RuntimeError, match=r"probes.cu:\d+: .* reads byte 512 of dynamic shared memory, to which a cp.async is still"
    ):
        probes.copy_groups(x, out, 32, 1, read_only=[0])


def test_every_block_finds_shared_memory_full_of_nan(any_probes):
    out = torch.zeros(3, 64, dtype=torch.int32)
    any_probes.read_unwritten(out)
    assert (out == -1).all()


def test_formats_round_as_the_hardware_does(plain):
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (100_000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    edges = torch.tensor(
        [0.0, -0.0, 65504, 65519.996, 65520, 2.0**-24, 2.0**-25, 3 * 2.0**-26, 2.0**-14, 1e-45, 3.4e38, torch.inf]
    )
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    ties = (halves + halves.roll(-1)) / 2
    x = torch.cat([edges, -edges, halves, ties, bits.view(torch.float32)])
    x = x[~x.isnan()].contiguous()
    half, bfloat16, tf32 = torch.empty(3, x.numel(), dtype=torch.int32)
    exp2 = torch.empty_like(x)
    plain.formats(x, half, bfloat16, tf32, exp2, x.numel(), read_only=[0])
    for packed, dtype in ((half, torch.float16), (bfloat16, torch.bfloat16)):
        pairs = packed.view(dtype).reshape(-1, 2)
        assert torch.equal(pairs[:, 0], x.to(dtype))
        assert (pairs[:, 1] == 1).all()
    away = (x.view(torch.int32).long() + (1 << 12)) & ~((1 << 13) - 1)  # nearest, ties away from zero
    assert torch.equal(tf32, away.to(torch.int32))
    exact = x.double().exp2().clamp(max=torch.finfo(torch.float32).max * 2)
    assert ((exp2 == exact.float()) | ((exp2 - exact).abs() <= 2 * torch.finfo(torch.float32).eps * exact)).all()  # two ulps


# -------------------------------------------------------------------------------------------------------------------- schedules


def test_schedules_order_threads_and_blocks(probes):
    def order(name, seed=0):
        probes.schedule(name, seed)
        out = torch.zeros(5 * 64, dtype=torch.int32)
        probes.run_order(out, torch.zeros(1, dtype=torch.int32))
        return out.tolist()

    forward = list(range(5 * 64))
    assert order("forward") == forward
    assert order("reverse") == forward[::-1]
    assert sorted(order("random", 1)) == forward
    assert order("random", 1) == order("random", 1) != order("random", 2)
    probes.schedule("forward")


def test_a_missing_barrier_makes_schedules_disagree(plain):
    """Where nothing checks accesses, values tell."""
    x = torch.arange(64.0)
    results = []
    for name in ("forward", "reverse"):
        plain.schedule(name)
        results.append(torch.empty(64))
        plain.mistake(0, x, results[-1], read_only=[1])
    plain.schedule("forward")
    assert not torch.equal(*results)


# --------------------------------------------------------------------------------------------------------------------- mistakes

RACE = r"race: it (writes|reads) byte \d+ of the shared variable at .*, which thread .* (wrote|read) at .*probes.cu:\d+, and"
PENDING = r"to which a cp.async is still under way"
MISTAKES = {
    0: RACE,
    1: r"divergent barrier: (this thread ended while \d+ of 64 wait in __syncthreads at|\d+ of 64 threads ended before this)",
    2: r"divergent barrier: \d+ of 64 threads wait in another __syncthreads, at .*probes.cu:\d+",
    3: r"thread \(63, 0, 0\): out of bounds: it reads 4 bytes, beginning 0 past the end of argument 1 \(256 bytes\)",
    4: r"thread \(0, 0, 0\): out of bounds: it writes 4 bytes, beginning 4 before argument 2 \(256 bytes\)",
    5: r"it writes byte \d+ of argument 1, which is not its to change",
    6: r"thread \(63, 0, 0\): out of bounds: it reads 4 bytes, beginning 0 past the end of the shared variable at",
    7: r"undefined behaviour: access to an address that is not aligned to 16 bytes",
    8: r"race: it writes byte 0 of argument 2, which thread .* wrote",
    9: r"this thread ended while lanes of its warp wait for it in __shfl_xor_sync|__shfl_xor_sync .* lanes 0x.* have ended",
    10: r"__shfl_xor_sync with mask 0x00000001, in which the calling lane \d+ is not",
    11: r"deadlock: kernel mistake.*\n  32 threads, .* wait in __syncwarp at .*\n  32 threads, .* wait in __syncthreads at",
    12: r"ldmatrix: 16 bytes that are not in the block's shared memory",
    13: r"undefined behaviour: a signed sum overflows",
    14: r"cp.async's destination: the address is not aligned to 16 bytes",
    15: r"undefined behaviour: index outside an array",
    16: r"out of bounds: it reads 4 bytes( of memory that is no tensor|, beginning \d+ (before|past the end of))",
    17: RACE,
    18: f"{RACE}|{PENDING}",
    19: r"out of bounds: an atomic operation on 4 bytes, beginning 0 past the end of argument 2 \(256 bytes\)",
}


@pytest.mark.parametrize("name", emulation.SCHEDULES)
@pytest.mark.parametrize("which", MISTAKES)
def test_a_mistake_ends_the_launch_and_says_what_and_where(probes, which, name):
    probes.schedule(name, seed=1)
    x, y = torch.arange(64.0), torch.full((64,), -1.0)
    with pytest.raises(RuntimeError, match=MISTAKES[which]) as caught:
        probes.mistake(which, x, y, read_only=[1])
    assert "kernel mistake, block (0, 0, 0)" in str(caught.value)
    assert "probes.cu:" in str(caught.value)
    probes.schedule("forward")
    probes.mistake(99, x, y, read_only=[1])  # the machine goes on
    assert torch.equal(x, y)


def test_blocks_are_ordered_by_fences_alone(probes):
    arguments = [torch.zeros(n, dtype=torch.int32) for n in (256, 2, 1, 1)]
    with pytest.raises(
        RuntimeError, match=r"race: it reads byte \d of argument 1, which another block wrote at .*probes.cu:\d+"
    ):
        probes.sum_all(*arguments, 2, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 32, 0), "invalid configuration"),
        ((65536, 32, 0), "invalid configuration"),
        ((1, 1025, 0), "invalid configuration"),
        ((1, 32, 227 * 1024 + 1), "invalid argument"),
    ],
)
def test_what_no_gpu_can_launch_is_refused(probes, arguments, message):
    grid, block, shared = arguments
    with pytest.raises(RuntimeError, match=message):
        probes.configuration(grid, block, ctypes.c_size_t(shared), torch.zeros(1024, dtype=torch.int32))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_nvcc_takes_the_same_source(tmp_path, arch):
    """common.cuh's other body: every instruction of it is in the probes."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    command = [nvcc, "-std=c++17", f"-arch={arch}", "-cubin", f"-I{csrc_folder()}", str(PROBES), "-o", str(tmp_path / "cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
