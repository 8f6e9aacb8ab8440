"""What the conformance kit is made of: a part under test, the cases it is tried on, and properties, as plain functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ldmkit.interfaces import Part
from ldmkit.testing import strategies

Values = Mapping[str, Any]
"""Plain values of a config."""
SMALL = 3
"""How far from 0 drawn configs go where the config sets no bound, so that a run stays short."""


class Refused(Exception):
    """The part says, by a named error, that it does not serve such a case."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A part under test, and what its author says of it.

    Attributes:
        kind: sampler, denoiser, autoencoder or conditioner.
        part: its class.
        name: what it is registered as; None where it is not.
        configs: small configs as plain values, the first one the smallest; or a Hypothesis strategy of such values. Not given,
            a sampler's are drawn from its `Config`, and any other part is tried with its defaults.
        inputs: of a conditioner: at least two valid inputs that mean different things, of different lengths where they have
            any; or a Hypothesis strategy of inputs.
        condition: of a denoiser: the channels of each `Condition` field that it accepts ("tokens_BLC", "vector_BC",
            "spatial_BCHW"; for "labels_B" the number of classes), each as a number or as the name of the config field that says
            it; or a function that gives the numbers from the config.
        noiseless: of a sampler that draws noise by default: the config values that turn it into its probability flow.
        consistency: of a sampler: whether its `denoise` is to be a consistency function, not the posterior's mean.
        measured_at: of a sampler: the config values with which its laws of many steps are measured, where they do not hold for
            the others: of an adaptive one, those with which it takes as many steps as it is told, even in log(sigma / alpha).
    """

    kind: str
    part: type[Part]
    name: str | None = None
    configs: Sequence[Values] | st.SearchStrategy[Values] | None = None
    inputs: Sequence[Any] | st.SearchStrategy[Any] = ()
    condition: Mapping[str, int | str] | Callable[[Any], Mapping[str, int]] = field(default_factory=dict)
    noiseless: Values = field(default_factory=dict)
    consistency: bool = False
    measured_at: Values = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind} {self.name or self.part.__name__}"

    def fixed_configs(self) -> Sequence[Values]:
        """Those that are always tried."""
        if self.configs is None:
            required = any(known.is_required() for known in self.part.Config.model_fields.values())
            return () if required else ({},)
        return () if isinstance(self.configs, st.SearchStrategy) else self.configs

    def drawn_configs(self) -> st.SearchStrategy[Values]:
        """Those that Hypothesis chooses among."""
        if isinstance(self.configs, st.SearchStrategy):
            return self.configs
        if self.configs is None and self.kind == "sampler":
            return strategies.configs(self.part.Config, largest=SMALL).map(lambda config: config.to_dict())
        return st.sampled_from(self.fixed_configs() or ({},))

    def fixed_inputs(self) -> Sequence[Any]:
        """Those that are always tried."""
        return () if isinstance(self.inputs, st.SearchStrategy) else list(self.inputs)

    def drawn_inputs(self) -> st.SearchStrategy[list[Any]]:
        """Those that Hypothesis chooses among, in any order."""
        if isinstance(self.inputs, st.SearchStrategy):
            return st.lists(self.inputs, min_size=2, max_size=4)
        return st.permutations(list(self.inputs))


@dataclass(frozen=True)
class Trial:
    """One case of one property: what the checks speak to. A case is plain data, so that it can be told and replayed."""

    subject: Subject
    case: Mapping[str, Any]

    @property
    def values(self) -> Values:
        """The config's plain values."""
        found: Values = self.case["config"]
        return found

    @property
    def batch(self) -> int:
        """B, at least 2."""
        return int(self.case["batch"])

    @property
    def seed(self) -> int:
        """Of the numbers that are fed in."""
        return int(self.case["seed"])

    def build(self, **changes: Any) -> Any:
        """The part, with some config values changed. Fresh networks start from the case's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.subject.part.build(**{**self.values, **changes})

    def network(self, dtype: torch.dtype = torch.float64) -> Any:
        """The part in evaluation mode and `dtype`, its weights moved away from where they start, for zeros would hide much."""
        part = self.build()
        if isinstance(part, nn.Module):
            _stir(part, self.seed)
            part.to(dtype).eval()
        return part

    def normal(self, *shape: int, stream: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Normal numbers that follow from the case's seed."""
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _stir(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.is_floating_point() and weight.numel():
                fan_in = max(1, weight[0].numel()) if weight.ndim > 1 else 25
                weight.add_(torch.randn(weight.shape, generator=generator).to(weight) / fan_in**0.5)


@dataclass(frozen=True)
class Property:
    """One promise of an interface.

    Attributes:
        name: as tables show it.
        check: asserts it on a trial (of pipelines, on the pipeline); its docstring is what the interface expects.
        source: the public name whose documentation says so.
        once: whether it is tried on the first config alone, because it takes long or looks at the defaults.
        absent: why it says nothing about a subject; None where it does.
    """

    name: str
    check: Callable[[Any], None]
    source: str
    once: bool = False
    absent: Callable[[Subject], str | None] = lambda subject: None

    def __str__(self) -> str:
        return self.name

    @property
    def expected(self) -> str:
        """What the interface expects, in a sentence."""
        return " ".join((self.check.__doc__ or "").split())


def alike(got: Tensor, want: Tensor) -> bool:
    """Equal up to half of the digits: rounding may differ, results may not."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not got.is_floating_point():
        return torch.equal(got, want)
    size = float(torch.maximum(got.abs(), want.abs()).nan_to_num().max()) if got.numel() else 0.0
    return torch.allclose(got, want, rtol=0, atol=torch.finfo(got.dtype).eps ** 0.5 * size, equal_nan=True)


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Equal in every bit that matters: shape, dtype, numbers; NaN where the other has NaN."""
    both = got.dtype == want.dtype and got.shape == want.shape
    return both and bool(((got == want) | (got.isnan() & want.isnan())).all())


def apart(got: Tensor, want: Tensor) -> str:
    """How two tensors differ, in a message."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{tuple(got.shape)} {got.dtype}, not {tuple(want.shape)} {want.dtype}"
    return f"they differ by up to {float((got.double() - want.double()).abs().max()):.3g}"
