"""The suite of pipelines: a good one passes, and for each property a broken one does not."""

import shutil
from pathlib import Path

import pytest
import torch

import ldmkit
from ldmkit import UnknownPartError
from ldmkit.testing import conformance
from ldmkit.testing.conformance.pipelines import SavedPipeline

WIDTHS = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
UNET = {**WIDTHS, "transformer_layers_per_block": [1], "num_attention_heads": 2, "cross_attention_dim": 8}
LABELS = {"name": "class-label", "num_classes": 3, "hidden_size": 8}


def small(folder: Path, conditioner: object = None) -> Path:
    """A pipeline of fresh weights, saved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = ldmkit.Pipeline(
            autoencoder={"name": "kl", **WIDTHS},
            denoiser={"name": "unet", **UNET, **({} if conditioner else {"cross_attention_dim": None})},
            conditioner=conditioner,
            defaults={"height": 8, "width": 16},
        )
        for parameter in pipe.denoiser.parameters():  # layers that begin as zeros would let no condition through
            torch.nn.init.normal_(parameter, std=0.1)
    return pipe.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small(tmp_path_factory.mktemp("good") / "pipeline", LABELS)


def rows(what: SavedPipeline) -> dict[str, str]:
    return {row.name: row.verdict for row in conformance.check(what)}


def test_a_good_pipeline_passes(folder):
    report = conformance.check(conformance.pipeline(str(folder)))
    assert report.passed, report.table()
    assert {row.verdict for row in report} == {"passed"}
    assert report.kind == "pipeline"


def test_where_nothing_is_asked_nothing_is_told_apart(tmp_path):
    found = rows(conformance.pipeline(str(small(tmp_path / "pipeline"))))
    assert {name for name, verdict in found.items() if verdict != "passed"} == {"inputs are told apart"}
    assert found["inputs are told apart"] == "not applicable"


def decoding(change):
    """Changes what the autoencoder decodes: `change(y, calls so far)`."""

    def damage(pipe):
        decode, calls = pipe.autoencoder.decode, []
        pipe.autoencoder.decode = lambda z: (calls.append(1), change(decode(z), len(calls)))[1]

    return damage


def deaf(pipe):
    forward = pipe.conditioner.forward
    pipe.conditioner.forward = lambda inputs: forward([0 for _ in inputs])


BROKEN = {
    "pictures": decoding(lambda y, calls: y[:, :, 1:]),
    "same bits again": decoding(lambda y, calls: y + calls / 9),
    "pictures are independent": decoding(lambda y, calls: y - y.mean()),
    "inputs are told apart": deaf,
    "no files, network, global random numbers": decoding(lambda y, calls: (torch.rand(()), y)[1]),
    "saved and loaded, bit for bit": decoding(lambda y, calls: y / 2),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pipeline_is_caught(name, folder):
    class Broken(SavedPipeline):
        def load(self):
            pipe = super().load()
            BROKEN[name](pipe)
            return pipe

    (row,) = conformance.check(Broken(name=str(folder)), only=[name])
    assert row.verdict == "failed"
    assert f"written in: {row.source}" in row.message()


def test_pickles_are_caught(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "denoiser" / "more.bin").write_bytes(b"")
    (row,) = conformance.check(conformance.pipeline(str(copy)), only=["a folder without pickles"])
    assert row.reason.endswith("holds denoiser/more.bin")
    (row,) = conformance.check(SavedPipeline(name=str(tmp_path)), only=["a folder without pickles"])
    assert row.reason == f"{tmp_path} has no pipeline.json"


def test_every_property_has_a_broken_pipeline():
    assert {*BROKEN, "a folder without pickles"} == {prop.name for prop in conformance.PROPERTIES["pipeline"]}


def test_what_is_no_pipeline():
    with pytest.raises(UnknownPartError, match="no pipeline is called 'nobodys'"):
        conformance.pipeline("nobodys")
