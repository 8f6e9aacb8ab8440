"""What saved pipelines promise: a folder without pickles that loads by name, and pictures that follow from the call alone."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmkit.pipeline import Pipeline
from ldmkit.plugin.registry import registry
from ldmkit.testing.conformance import watch
from ldmkit.testing.conformance.conditioners import TEXTS
from ldmkit.testing.conformance.core import Property, Refused, alike, apart, same_bits
from ldmkit.testing.conformance.report import Row
from ldmkit.testing.trying import reason_of
from ldmkit.testing.verdicts import ABSENT, FAILED, PASSED

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
Call = Mapping[str, Any]
"""Arguments of a call."""


@dataclass(frozen=True, kw_only=True)
class SavedPipeline:
    """A pipeline under test.

    Attributes:
        name: what it is registered as, or its folder.
        inputs: arguments of two calls or more that mean different things. Not given: prompts where the conditioner takes texts,
            class labels where it takes numbers. Runs are of 2 steps where they do not say.
    """

    name: str
    inputs: Sequence[Call] = ()

    kind = "pipeline"

    def __str__(self) -> str:
        return f"pipeline {self.name}"

    def folder(self) -> Path:
        """Where it is saved."""
        return Path(self.name) if Path(self.name).is_dir() else Path(registry().load("pipeline", self.name)())

    def load(self) -> Pipeline:
        """As a user does."""
        return Pipeline.from_pretrained(self.name)

    def calls(self, pipe: Pipeline) -> Sequence[Call]:
        """What is asked of it."""
        if self.inputs:
            return self.inputs
        if pipe.conditioner is None:
            return ({},)
        if isinstance(pipe.conditioner.null_input, str | None):
            return [{"prompt": text} for text in TEXTS]
        return [{"class_labels": label} for label in range(2)]


def draw(pipe: Pipeline, call: Call, **more: Any) -> Tensor:
    """(B, C, H, W) in [0, 1]."""
    told = {"num_inference_steps": 2, "seed": 1, "output_type": "pt", "progress": False, **call, **more}
    images: Tensor = pipe(**told).images
    return images


def no_pickles(what: SavedPipeline) -> None:
    """The target is a function that returns the folder of a saved pipeline: JSON, safetensors and the files that configs name,
    no pickles.
    """
    folder = what.folder()
    assert (folder / "pipeline.json").is_file(), f"{folder} has no pipeline.json"
    pickles = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in PICKLES)
    assert not pickles, f"{folder} holds {', '.join(pickles)}"


def pictures(what: SavedPipeline) -> None:
    """A call gives finite pictures in [0, 1], as high and as wide as asked for, or else as the pipeline's defaults say."""
    pipe = what.load()
    for call in what.calls(pipe):
        images = draw(pipe, call)
        assert images.ndim == 4 and images.shape[1] == pipe.autoencoder.image_channels, f"{call} gives {tuple(images.shape)}"
        assert bool(images.isfinite().all()), f"{call} gives pictures that are not finite"
        assert float(images.min()) >= 0 and float(images.max()) <= 1, f"{call} gives values outside [0, 1]"
        for name, side in (("height", images.shape[2]), ("width", images.shape[3])):
            asked = call.get(name, None if "image" in call else getattr(pipe.defaults, name))
            assert asked in (None, side), f"{call}: {name} {side}, not {asked}"


def same_again(what: SavedPipeline) -> None:
    """The same arguments and seed give the same bits, whatever was drawn before; another seed gives another picture."""
    pipe = what.load()
    call = what.calls(pipe)[0]
    first, other, again = draw(pipe, call), draw(pipe, call, seed=2), draw(pipe, call)
    assert same_bits(again, first), f"drawn again: {apart(again, first)}"
    assert not same_bits(other, first), "another seed gives the same picture"


def independent(what: SavedPipeline) -> None:
    """Picture k depends on (seed, first_image + k) alone, whatever the batch."""
    pipe = what.load()
    call = what.calls(pipe)[0]
    together, alone = draw(pipe, call, num_images_per_prompt=2)[1:], draw(pipe, call, first_image=1)
    assert alike(together, alone), f"beside another one: {apart(together, alone)}"


def told_apart(what: SavedPipeline) -> None:
    """What is asked for is heard: calls that mean different things give different pictures."""
    pipe = what.load()
    calls = what.calls(pipe)
    if len(calls) < 2:
        raise Refused("it has no conditioner")
    drawn = [draw(pipe, call) for call in calls]
    for i, one in enumerate(drawn):
        for j, other in enumerate(drawn[:i]):
            assert not same_bits(one, other), f"{calls[i]} and {calls[j]} give the same picture"


def no_deeds(what: SavedPipeline) -> None:
    """Loading it and drawing writes no files, opens no connections, starts no processes and spends no global random numbers."""
    with watch.deeds() as seen:
        pipe = what.load()
        draw(pipe, what.calls(pipe)[0])
    assert not seen, f"it {'; it '.join(seen[:3])}"


def saved(what: SavedPipeline) -> None:
    """`save_pretrained` and `from_pretrained` give a pipeline back that draws the same bits."""
    pipe = what.load()
    call = what.calls(pipe)[0]
    want = draw(pipe, call)
    with tempfile.TemporaryDirectory() as folder:
        again = Pipeline.from_pretrained(pipe.save_pretrained(Path(folder) / "copy"))
        got = draw(again, call)
    assert same_bits(got, want), f"what was loaded draws other pictures: {apart(got, want)}"


PROPERTIES = (
    Property("a folder without pickles", no_pickles, "ldmkit.plugin.spec.Component"),
    Property("pictures", pictures, "ldmkit.Pipeline.__call__"),
    Property("same bits again", same_again, "ldmkit.Pipeline.__call__"),
    Property("pictures are independent", independent, "ldmkit.Pipeline.__call__"),
    Property("inputs are told apart", told_apart, "ldmkit.Conditioner.forward"),
    Property("no files, network, global random numbers", no_deeds, "ldmkit.Pipeline.from_pretrained"),
    Property("saved and loaded, bit for bit", saved, "ldmkit.Pipeline.save_pretrained"),
)


def try_pipeline(prop: Property, what: SavedPipeline) -> Row:
    """One row of the report."""
    verdict, cases, reason, raised = PASSED, 1, "", None
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prop.check(what)
    except Refused as error:
        verdict, cases, reason = ABSENT, 0, str(error)
    except Exception as error:
        verdict, cases, raised = FAILED, 0, error
        reason = reason_of(error)
    told: dict[str, Any] = {"name": prop.name, "expected": prop.expected, "source": prop.source}
    return Row(**told, verdict=verdict, cases=cases, reason=reason, error=raised)
