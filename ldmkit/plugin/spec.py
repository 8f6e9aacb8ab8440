"""The one light module a plugin author imports: what a plugin may tell ldmkit, as typed pluggy hooks.

A plugin is a distribution with an entry point in the group `ldmkit` that names a module (or object) holding hook
implementations. Nothing here, nor in that module, should import torch: targets are strings, imported when a part is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import pluggy

from ldmkit.errors import PluginError

API_VERSION = (1, 0)
"""The plugin interface's version, (major, minor). Minor versions only add."""

Kind = Literal["autoencoder", "denoiser", "conditioner", "sampler", "pipeline"]
KINDS: tuple[str, ...] = get_args(Kind)

hookspec = pluggy.HookspecMarker("ldmkit")
hookimpl = pluggy.HookimplMarker("ldmkit")


@dataclass(frozen=True, kw_only=True)
class Component:
    """One line of the table of parts: plain data.

    Attributes:
        kind: autoencoder, denoiser, conditioner, sampler or pipeline.
        name: what users write, lower case, words joined with hyphens ("euler-ancestral").
        target: "package.module:Class", imported on first use. For a pipeline: "package.module:function", returning the folder
            of a saved pipeline.
        summary: one line for listings.
        diffusers: class names of diffusers and transformers that the part reads and writes (see `ldmkit.checkpoints.foreign`);
            joined by "+" where one part is made of several components.

    Raises:
        PluginError: for an unknown kind, a name that is not lower-case words, or a target that is not "module:attribute".
    """

    kind: Kind
    name: str
    target: str
    summary: str = ""
    diffusers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PluginError(f"component {self.name!r}: kind {self.kind!r} is none of {', '.join(KINDS)}")
        if not self.name or not all(word.isalnum() and word == word.lower() for word in self.name.replace("+", "").split("-")):
            raise PluginError(f"component name {self.name!r}: use lower-case words joined with hyphens, like 'euler-ancestral'")
        module, colon, attribute = self.target.partition(":")
        if not (module and colon and attribute):
            raise PluginError(f"component {self.name!r}: target {self.target!r} is not of the form 'package.module:Class'")


@hookspec
def ldmkit_components() -> Iterable[Component]:
    """The parts a plugin offers.

    >>> from ldmkit.plugin.spec import Component, hookimpl
    >>> @hookimpl
    ... def ldmkit_components():
    ...     return [Component(kind="sampler", name="my-sampler", target="my_package.sampler:MySampler", summary="My way.")]
    >>> ldmkit_components()[0].name
    'my-sampler'
    """
    raise AssertionError("a hook specification is never called")


KERNEL_OPS = ("group_norm_silu", "cross_attention", "geglu", "geglu_linear")
KERNEL_DEVICES = ("cpu", "cuda")
KERNEL_DTYPES = ("float32", "bfloat16", "float16", "float64")
RESERVED = ("auto", "reference", "cpu", "triton", "cuda")
"""Backends that no plugin may call its own."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One implementation of one of the fused ops: plain data.

    Attributes:
        op: one of `KERNEL_OPS`.
        backend: what users write in `backend=`, lower-case words joined with hyphens.
        target: "package.module:object", imported on first use. The object has functions `forward` and `backward` with the
            signatures of `ldmkit/kernels/<op>/op.py` (without the last argument), and may have `missing()`, which says why it
            cannot run on this machine (or None), and `refusal(*arguments)`, which says why it cannot serve a call (or None).
        device: the type of device it serves, "cpu" or "cuda".
        dtypes: what it serves.
        summary: one line for listings.

    Raises:
        PluginError: for an op, device or dtype there is not, a backend that is not lower-case words, the name of a built-in
            one, or a malformed target.
    """

    op: str
    backend: str
    target: str
    device: str
    dtypes: tuple[str, ...] = KERNEL_DTYPES
    summary: str = ""

    def __post_init__(self) -> None:
        choices = [("op", self.op, KERNEL_OPS), ("device", self.device, KERNEL_DEVICES)]
        choices += [("dtype", dtype, KERNEL_DTYPES) for dtype in self.dtypes]
        for what, value, known in choices:
            if value not in known:
                raise PluginError(f"kernel {self.backend!r}: {what} {value!r} is none of {', '.join(known)}")
        if self.backend in RESERVED or not all(word.isalnum() and word == word.lower() for word in self.backend.split("-")):
            raise PluginError(
                f"kernel backend {self.backend!r}: use lower-case words joined with hyphens, other than {', '.join(RESERVED)}"
            )
        module, colon, attribute = self.target.partition(":")
        if not (module and colon and attribute):
            raise PluginError(f"kernel {self.backend!r}: target {self.target!r} is not of the form 'package.module:object'")


@hookspec
def ldmkit_kernels() -> Iterable[Kernel]:
    """Further implementations of the fused ops. They run where they are named (`backend=`, `ldmkit.kernels.use`,
    LDMKIT_KERNELS), never by themselves; `ldmkit verify OP --backend NAME` checks them.

    >>> from ldmkit.plugin.spec import Kernel, hookimpl
    >>> @hookimpl
    ... def ldmkit_kernels():
    ...     return [Kernel(op="geglu", backend="mine", target="my_package.kernels:geglu", device="cpu")]
    >>> ldmkit_kernels()[0].backend
    'mine'
    """
    raise AssertionError("a hook specification is never called")


@dataclass(frozen=True, kw_only=True)
class Extension:
    """One line of the table of what plugins offer beside parts and kernels: plain data. Use the class of its kind.

    Attributes:
        name: what users write, lower-case words joined with hyphens.
        target: "package.module:object", imported on first use; the hook of its kind says what it must be.
        summary: one line for listings.

    Raises:
        PluginError: for a name that is not lower-case words, or a malformed target.
    """

    kind: ClassVar[str]
    name: str
    target: str
    summary: str = ""

    def __post_init__(self) -> None:
        if not all(word.isalnum() and word == word.lower() for word in self.name.split("-")):
            raise PluginError(f"{self.kind} {self.name!r}: use lower-case words joined with hyphens")
        module, colon, attribute = self.target.partition(":")
        if not (module and colon and attribute):
            raise PluginError(f"{self.kind} {self.name!r}: target {self.target!r} is not of the form 'package.module:object'")


class Task(Extension):
    """See `ldmkit_tasks`."""

    kind = "task"


class CheckpointFormat(Extension):
    """See `ldmkit_checkpoint_formats`."""

    kind = "checkpoint-format"


class TrainingLoss(Extension):
    """See `ldmkit_training_losses`."""

    kind = "training-loss"


class DataSource(Extension):
    """See `ldmkit_data_sources`."""

    kind = "data-source"


class GuidanceMethod(Extension):
    """See `ldmkit_guidance_methods`."""

    kind = "guidance-method"


@hookspec
def ldmkit_tasks() -> Iterable[Task]:
    """What can be done with a pipeline beside drawing: `pipe.run_task("my-task", image, strength=0.5)`.

    The target is a function `(pipe: ldmkit.Pipeline, *args, **kwargs) -> ldmkit.pipeline.PipelineOutput`. It calls the pipeline
    as often as it likes; what it does not know of its arguments it must refuse, as functions do.

    >>> from ldmkit.plugin.spec import Task, hookimpl
    >>> @hookimpl
    ... def ldmkit_tasks():
    ...     return [Task(name="variations", target="my_package.tasks:variations", summary="An image, drawn again.")]
    >>> ldmkit_tasks()[0].name
    'variations'
    """
    raise AssertionError("a hook specification is never called")


@hookspec
def ldmkit_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """Layouts that `Pipeline.from_pretrained` and `from_single_file` read beside those of ldmkit itself, files or folders.

    The target is an object with two functions. `detect(path: pathlib.Path) -> float | None` looks at names and keys
    only, and says how sure it is, up to 1, or None; the surest format is taken, and two as sure are an error.
    `load(path: pathlib.Path, *, dtype: torch.dtype | "auto", device: torch.device | str) -> Mapping[str, Any]` returns the
    arguments of `ldmkit.Pipeline`, with weights in that dtype and on that device.

    >>> from ldmkit.plugin.spec import CheckpointFormat, hookimpl
    >>> @hookimpl
    ... def ldmkit_checkpoint_formats():
    ...     return [CheckpointFormat(name="my-layout", target="my_package.layout:MyLayout", summary="Ours.")]
    >>> ldmkit_checkpoint_formats()[0].kind
    'checkpoint-format'
    """
    raise AssertionError("a hook specification is never called")


@hookspec
def ldmkit_training_losses() -> Iterable[TrainingLoss]:
    """Distances between what a denoiser predicts and what it should, for `ldmkit train diffusion`: in the recipe,
    `loss: {name: my-loss, delta: 0.1}`.

    The target is a class with a nested `class Config(ldmkit.Config)`, built from it, whose instances are called
    `(output_BCHW: Tensor, target_BCHW: Tensor) -> Tensor` and return one value per picture, (B,). The recipe's weighting
    multiplies it.

    >>> from ldmkit.plugin.spec import TrainingLoss, hookimpl
    >>> @hookimpl
    ... def ldmkit_training_losses():
    ...     return [TrainingLoss(name="pseudo-huber", target="my_package.losses:PseudoHuber")]
    >>> ldmkit_training_losses()[0].name
    'pseudo-huber'
    """
    raise AssertionError("a hook specification is never called")


@hookspec
def ldmkit_data_sources() -> Iterable[DataSource]:
    """Where training pictures come from, beside npz files, folders and datasets: in the recipe,
    `data: {source: {name: my-source, url: ...}, size: 64}`.

    The target is a class with a nested `class Config(ldmkit.Config)`, built from it, with
    `open(data: ldmkit.training.recipes.DataConfig, base: pathlib.Path, *, channels: int, conditioned: bool) ->
    ldmkit.training.data.Pictures`: pictures of `data.height_width` and `channels` (3 or 1), relative paths taken from `base`,
    with one condition each where `conditioned`. They may say the `original_sizes` and `crops` of pictures, which conditioners
    such as `sdxl-text` are told. What is wrong raises `ldmkit.DataError` before training.

    >>> from ldmkit.plugin.spec import DataSource, hookimpl
    >>> @hookimpl
    ... def ldmkit_data_sources():
    ...     return [DataSource(name="my-source", target="my_package.data:MySource")]
    >>> ldmkit_data_sources()[0].name
    'my-source'
    """
    raise AssertionError("a hook specification is never called")


@hookspec
def ldmkit_guidance_methods() -> Iterable[GuidanceMethod]:
    """Ways to guide, in the place of classifier-free guidance: `pipe(..., guidance_method={"name": "my-way", "power": 2})`.

    The target is a class with a nested `class Config(ldmkit.Config)`, built from it, whose instances are called
    `(model: ldmkit.Model, condition: ldmkit.Condition, negative: ldmkit.Condition | None, scale: float) -> ldmkit.Denoise`.
    `negative` is None where the call has none; `scale` is the call's guidance_scale. The result is called with (x, level) at
    every evaluation of a run and returns the guided estimate of x0; by `ldmkit.Denoised.carry` where the model also predicts
    the variance and a sampler takes it.

    >>> from ldmkit.plugin.spec import GuidanceMethod, hookimpl
    >>> @hookimpl
    ... def ldmkit_guidance_methods():
    ...     return [GuidanceMethod(name="my-way", target="my_package.guidance:MyWay")]
    >>> ldmkit_guidance_methods()[0].name
    'my-way'
    """
    raise AssertionError("a hook specification is never called")


EXTENSIONS: dict[str, type[Extension]] = {
    "ldmkit_tasks": Task,
    "ldmkit_checkpoint_formats": CheckpointFormat,
    "ldmkit_training_losses": TrainingLoss,
    "ldmkit_data_sources": DataSource,
    "ldmkit_guidance_methods": GuidanceMethod,
}
"""What each of these hooks offers."""
EXTENSION_KINDS = tuple(extension.kind for extension in EXTENSIONS.values())


@dataclass(frozen=True, kw_only=True)
class Example:
    """A small instance of a part, for checks from outside: plain data.

    Attributes:
        kind, name: of the part, as in its `Component`.
        configs: small configs as plain values, the first one the smallest.
        inputs: of a conditioner: two or more valid inputs that mean different things; of a pipeline: the arguments of two or
            more such calls, as mappings.
        condition: of a denoiser: the channels of each `Condition` field that it accepts ("labels_B": how many classes), as a
            number, or as the name of the config field that says it.
        noiseless: of a sampler that draws noise by default: the config values that turn that off.
        consistency: of a sampler: whether it is for consistency models.
        measured_at: of a sampler: the config values with which laws of many steps hold, where others do not do; of an adaptive
            one, those with which it takes as many steps as it is told.

    Raises:
        PluginError: for an unknown kind.
    """

    kind: Kind
    name: str
    configs: tuple[Mapping[str, Any], ...] = ()
    inputs: tuple[Any, ...] = ()
    condition: Mapping[str, int | str] = field(default_factory=dict)
    noiseless: Mapping[str, Any] = field(default_factory=dict)
    consistency: bool = False
    measured_at: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PluginError(f"example of {self.name!r}: kind {self.kind!r} is none of {', '.join(KINDS)}")


@hookspec
def ldmkit_examples() -> Iterable[Example]:
    """How the parts of a plugin are tried: `ldmkit.testing.conformance` and `ldmkit plugin check` take their configs from here.

    >>> from ldmkit.plugin.spec import Example, hookimpl
    >>> @hookimpl
    ... def ldmkit_examples():
    ...     return [Example(kind="denoiser", name="mine", configs=({"width": 16},), condition={"tokens_BLC": 8})]
    >>> ldmkit_examples()[0].name
    'mine'
    """
    raise AssertionError("a hook specification is never called")


@hookspec
def ldmkit_api() -> str:
    """The range of plugin API versions a plugin works with, as a version specifier; any 1.x where it is not given.

    >>> from ldmkit.plugin.spec import hookimpl
    >>> @hookimpl
    ... def ldmkit_api():
    ...     return ">=1.0,<2"
    >>> ldmkit_api()
    '>=1.0,<2'
    """
    raise AssertionError("a hook specification is never called")
