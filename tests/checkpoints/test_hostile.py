"""Files that are broken or mean harm: a named error, no code run, memory bounded."""

import codecs
import contextlib
import io
import itertools
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from ldmkit import Pipeline
from ldmkit.checkpoints.container import SafetensorsFile
from ldmkit.checkpoints.pickles import read_pickle
from ldmkit.checkpoints.skeletons import skeleton
from ldmkit.checkpoints.weights import read_weights
from ldmkit.errors import ArchitectureMismatchError, CheckpointError, ConfigError, LdmkitError
from tests.checkpoint_peers import stable_diffusion
from tests.conditions import tiny_pipeline
from tests.mutants import Spoilt, header_of, with_header

TENSORS = {
    "a.weight": torch.randn(3, 4),
    "a.bias": torch.arange(5),
    "b": torch.zeros(()),
    "c": torch.ones(2, 0),
    "d": torch.ones(7).half(),
}
WHOLE = save(TENSORS, metadata={"format": "pt"})
LENGTH = struct.unpack("<Q", WHOLE[:8])[0]


DATA = WHOLE[8 + LENGTH :]


def header() -> dict[str, Any]:
    return header_of(WHOLE)


def edited(key: str, **changes: Any) -> bytes:
    content = header()
    content[key] = {**content[key], **changes}
    return with_header(content, DATA)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated within its header"),
        (WHOLE[:-3], "is truncated: it has .* the first being"),
        (struct.pack("<Q", 2**63) + WHOLE[8:], "truncated within its header"),
        (struct.pack("<Q", LENGTH - 5) + WHOLE[8:], "header is corrupt"),
        (with_header(b"[" * 100_000, DATA), "header is corrupt"),
        (with_header([1], DATA), "it is no JSON object"),
        (with_header(WHOLE[8 : 8 + LENGTH].rstrip()[:-1] + b',"b":{}}', DATA), "the key 'b' is there twice"),
        (with_header({**header(), "__metadata__": {"a": 1}}, DATA), "__metadata__ must map strings to strings"),
        (edited("b", shape=[10**6, 10**6, 10**6]), "would need 4000000000000000000 bytes and has 4"),
        (edited("b", shape=[-1]), r"has shape \[-1\]"),
        (edited("b", shape=[True]), "has shape"),
        (edited("b", dtype="F7"), "has dtype 'F7'; known are BOOL"),
        (edited("b", dtype=["F32"]), "needs dtype, shape"),
        (edited("b", data_offsets=[0, 4]), "overlaps the tensor before it"),
        (edited("b", data_offsets=[10**9, 10**9 + 4]), "is truncated"),
        (edited("b", data_offsets="ab"), "has shape|needs dtype"),
        (edited("b", data_offsets=[4]), "needs dtype, shape and two data_offsets"),
        (with_header({key: value for key, value in header().items() if key != "b"}, DATA), "leaves a hole|belong to no tensor"),
        (WHOLE + b"more", "4 bytes at the end belong to no tensor"),
        (b"PK\x03\x04\xff\xff\xff\xff" + bytes(100), "is a pickle, not a safetensors file"),
    ],
)
def test_broken_headers(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(path)


def test_a_whole_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE)
    assert all(torch.equal(value, TENSORS[key]) for key, value in SafetensorsFile(path).tensors().items())
    text = WHOLE[8 : 8 + LENGTH].rstrip() + b" "
    path.write_bytes(with_header(text + b" " * (len(text) % 2 == 0), DATA))  # an odd length: nothing is aligned
    assert all(torch.equal(value, TENSORS[key]) for key, value in SafetensorsFile(path).tensors().items())


# --------------------------------------------------------------------------------------------------------------------- pickles


class Harmful:
    """Unpickling this would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    path, proof = tmp_path / "x.ckpt", tmp_path / "proof"
    torch.save({"state_dict": TENSORS, "callback": Harmful(proof)}, path)
    with pytest.raises(CheckpointError, match=r"holds more than tensors .*; such pickles can run code, and none was run"):
        Pipeline.from_single_file(path, allow_pickle=True)
    path.write_bytes(pickle.dumps(Harmful(proof)))
    with pytest.raises(CheckpointError, match="is no zip archive"):
        read_pickle(path)
    assert not proof.exists()


def test_a_trainer_s_checkpoint_is_read_without_its_classes(tmp_path: Path) -> None:
    """As Stable Diffusion's first files, which name Lightning's callback and numpy's scalars beside the weights."""
    state = {"state_dict": TENSORS, "callbacks": {Callback: {"best": 3}}, "score": Scalar(), "made": Callback()}
    names = {f"{cls.__module__}\n{cls.__name__}".encode(): theirs for cls, theirs in ((Callback, CALLBACK), (Scalar, SCALAR))}
    content = resaved(tmp_path, state, names)
    (tmp_path / "x.ckpt").write_bytes(content)
    read = read_pickle(tmp_path / "x.ckpt")
    assert all(torch.equal(value, TENSORS[key]) for key, value in read.items())


def test_calls_that_grow(tmp_path: Path) -> None:
    """A few bytes of pickle must not become all of the memory: torch's unpickler would call both."""
    for made in (Growing(bytearray, (10**12,)), Growing(codecs.encode, (b"x" * 100, "hex"))):
        torch.save({"state_dict": TENSORS, "more": made}, tmp_path / "x.ckpt")
        with pytest.raises(CheckpointError, match=r"calls (\w+ bytearray|_codecs encode with 'hex'), which weights never do"):
            read_pickle(tmp_path / "x.ckpt")
    torch.save({"state_dict": TENSORS, "bytes": b"plain", "hex": 1}, tmp_path / "x.ckpt", pickle_protocol=2)
    with pytest.raises(CheckpointError, match="_codecs encode with 'hex'"):
        read_pickle(tmp_path / "x.ckpt")
    torch.save({"state_dict": TENSORS, "bytes": b"plain"}, tmp_path / "x.ckpt", pickle_protocol=2)
    assert read_pickle(tmp_path / "x.ckpt").keys() == TENSORS.keys()


class Callback:
    """Stands for a class of a library that is not installed."""

    def __init__(self) -> None:
        self.kept = 3


class Scalar(Callback):
    """Likewise."""

    def __reduce__(self) -> Any:
        return type(self), (1, b"2"), (3, "<")


CALLBACK, SCALAR = b"pytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint", b"numpy.core.multiarray\nscalar"


class Growing:
    """Unpickling this calls a function."""

    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def resaved(folder: Path, content: Any, names: dict[bytes, bytes]) -> bytes:
    """What torch.save writes, with other names of classes in the pickle."""
    torch.save(content, folder / "before.ckpt", pickle_protocol=2)
    made = io.BytesIO()
    with zipfile.ZipFile(folder / "before.ckpt") as before, zipfile.ZipFile(made, "w") as after:
        for member in before.infolist():
            data = before.read(member)
            if member.filename.endswith(".pkl"):
                for old, new in names.items():
                    assert old in data
                    data = data.replace(old, new)
            after.writestr(member, data)
    return made.getvalue()


def test_archives_that_grow(tmp_path: Path) -> None:
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(50_000_000))
    with pytest.raises(CheckpointError, match=r"is compressed \(archive/data/0\), which torch.save never does"):
        read_pickle(path)


def test_tensors_larger_than_what_is_stored(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="is larger than what is stored of it"):
        read_pickle(tmp_path / "x.ckpt")
    torch.save([1, 2], tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="holds a list, not tensors by name"):
        read_pickle(tmp_path / "x.ckpt")


# --------------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..\\x.safetensors", "..", ""])
def test_shards_outside_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="points outside the folder"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}, 3])
def test_shard_indices_of_wrong_types(tmp_path: Path, content: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="must hold a weight_map"):
        read_weights(tmp_path)


def test_shards_that_hold_a_key_twice_or_not_at_all(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"a are in y\.safetensors and in another shard too"):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"b": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match="promises keys that no shard holds: b"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("value", "dtype", "message"), [(float("nan"), "auto", "has 1 NaN"), (1e30, torch.float16, "cannot hold")]
)
def test_weights_that_are_no_numbers(tmp_path: Path, value: float, dtype: Any, message: str) -> None:
    """Told before anything is drawn or saved, and a pipeline in use stays as it was."""
    pipe = tiny_pipeline(tmp_path)
    folder = pipe.save_pretrained(tmp_path / "p")
    before = {key: tensor.clone() for key, tensor in pipe.denoiser.state_dict().items()}
    spoilt = {**before, "conv_in.bias": before["conv_in.bias"].clone()}
    spoilt["conv_in.bias"][3] = value
    save_file(spoilt, folder / "denoiser" / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"conv_in\.bias .*{message}"):
        Pipeline.from_pretrained(folder, dtype=dtype)("a red apple", num_inference_steps=1)
    assert all(torch.equal(before[key], tensor) for key, tensor in pipe.denoiser.state_dict().items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("folder")
    stable_diffusion(place / "tokenizer").save_pretrained(place / "sd")
    tiny_pipeline(place).save_pretrained(place / "own")
    return place / "sd"


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("model_index.json", {"unet": None}),
        ("model_index.json", {"vae": {}}),
        ("model_index.json", {"scheduler": [1, 2]}),
        ("model_index.json", {"_class_name": ["DDPMPipeline"], "vae": [None, None]}),
        ("scheduler/scheduler_config.json", {"prediction_type": []}),
        ("scheduler/scheduler_config.json", {"beta_start": "small"}),
        ("unet/config.json", {"down_block_types": 3}),
        ("text_encoder/config.json", {"num_attention_heads": 5}),
    ],
)
def test_some_configs_of_wrong_types(folder: Path, file: str, changes: dict[str, Any]) -> None:
    path = folder / file
    spoilt = json.dumps({**json.loads(path.read_text()), **changes}).encode()
    with Spoilt(path, spoilt), pytest.raises(LdmkitError):
        Pipeline.from_pretrained(folder)


def enlarged(content: Any, place: tuple[str | int, ...], value: Any) -> bytes:
    at = content
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("file", "place", "value", "message"),
    [
        ("sd/unet/config.json", ("layers_per_block",), 2**31, r"a model of \d+ weights and more, and there are \d+"),
        ("sd/unet/config.json", ("transformer_layers_per_block",), 2**40, r"a model of \d+ weights and more"),
        ("sd/unet/config.json", ("block_out_channels", 1), 2**31, r"a model of \d+ bytes and more"),
        ("sd/vae/config.json", ("block_out_channels",), [8, 8, 8, 8] * 500, r"a model of \d+ weights and more"),
        ("sd/text_encoder/config.json", ("num_hidden_layers",), 2**31, r"a model of \d+ weights and more"),
        ("sd/text_encoder/config.json", ("max_position_embeddings",), 2**31, r"a model of \d+ bytes and more"),
        ("sd/scheduler/scheduler_config.json", ("num_train_timesteps",), 2**31, "num_train_timesteps = 2147483648"),
        ("own/denoiser/part.json", ("config", "block_out_channels", 1), 10**30, "a tensor that cannot be"),
        ("own/conditioner/part.json", ("config", "vocab"), 7, "must be the bare name of a file"),
        ("own/conditioner/part.json", ("config", "vocab"), "..", "must be the bare name of a file"),
    ],
)
def test_configs_that_grow(folder: Path, file: str, place: tuple[str | int, ...], value: Any, message: str) -> None:
    """Refused before the memory is there, by what the weights file holds."""
    path = folder.parent / file
    spoilt = enlarged(json.loads(path.read_text()), place, value)
    with Spoilt(path, spoilt), pytest.raises(LdmkitError, match=message):
        Pipeline.from_pretrained(folder.parent / file.partition("/")[0])


def numbers(content: Any, *above: str | int) -> Iterator[tuple[str | int, ...]]:
    """Where the numbers are."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield *above, key
        elif isinstance(value, dict | list):
            yield from numbers(value, *above, key)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["sd", "own"])
def test_every_number_of_a_config_made_huge(folder: Path, name: str) -> None:
    """The pipeline as it was (a size that nothing is made of), or an error of ours; `test_configs_that_grow` says which."""
    vocabularies = ("vocab.json", "tokenizer.json")  # whose many numbers are ids
    for path in sorted(path for path in (folder.parent / name).rglob("*.json") if path.name not in vocabularies):
        for place, value in itertools.product(numbers(json.loads(path.read_text())), (2**31, 2**40, 10**30)):
            with Spoilt(path, enlarged(json.loads(path.read_text()), place, value)), contextlib.suppress(LdmkitError):
                Pipeline.from_pretrained(folder.parent / name)


def test_a_class_with_tables_of_its_own_is_bounded() -> None:
    """Also where it is made with numbers, which it asks for."""

    class Tables(torch.nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.empty(2))
            self.asked = float(self.scale.detach().sum())
            self.register_buffer("table", torch.arange(size), persistent=False)

    held = [torch.ones(2)]
    assert skeleton(Tables, 1000, held=held).table.tolist() == list(range(1000))
    with pytest.raises(ArchitectureMismatchError, match="x: the config describes a model of 8589934600 bytes"):
        skeleton(Tables, 2**30, held=held, source="x")
    with pytest.raises(ConfigError, match=r"x: Tables cannot be made of its config \(TypeError: .*list"):
        skeleton(Tables, [], source="x")
