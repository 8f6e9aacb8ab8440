"""LoRA: every way of naming the keys, merging against float64, and nothing left behind."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from ldmkit import Pipeline
from ldmkit.adapters import Adapter, Adapters
from ldmkit.checkpoints.assembling import UnexpectedKeysWarning
from ldmkit.checkpoints.inspecting import inspect
from ldmkit.checkpoints.lora import Pair, pairs_of
from ldmkit.checkpoints.lora_files import read_lora
from ldmkit.checkpoints.lora_names import Layers
from ldmkit.checkpoints.skeletons import skeleton
from ldmkit.errors import ArchitectureMismatchError, CheckpointError, InputError, InputTypeError
from ldmkit.kernels import record
from ldmkit.nn.low_rank import directions
from ldmkit.testing.accuracy import assert_as_accurate
from ldmkit_text.clip import CLIPTextConditioner
from ldmkit_unet.presets import PRESETS
from ldmkit_unet.unet import UNet
from tests.checkpoint_peers import latents, stable_diffusion
from tests.peers import in_float64

RANK, ALPHA = 3, 2.0
Pairs = dict[str, Pair]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return stable_diffusion(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "sd"
    peer.save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder)


def layers_of(pipe: Pipeline) -> Layers:
    return Layers(pipe.denoiser, pipe.conditioner)


def draw(layers: Layers, wanted: Callable[[str], bool] = lambda name: True, *, seed: int = 0, alpha: float = ALPHA) -> Pairs:
    """A random pair for each layer, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, layer in layers.by_name.items():
        if wanted(name):
            out, *rest = layer.weight.shape
            down = torch.randn(RANK, *rest, generator=generator) / (rest[0] * max(rest[-1] ** 2, 1)) ** 0.5
            up = torch.randn(out, RANK, *(1 for _ in rest[1:]), generator=generator) / 3
            pairs[name] = Pair(down, up, alpha / RANK)
    return pairs


def with_magnitudes(pairs: Pairs, layers: Layers, axis: int) -> Pairs:
    """DoRA's, of each output (axis 0) or input (1): about the norms of the weights, so that half of it is seen."""
    made = {}
    for name, pair in pairs.items():
        weight = layers.by_name[name].weight.detach()
        norm = torch.linalg.vector_norm(weight, dim=[dim for dim in range(weight.ndim) if dim != axis], keepdim=True)
        made[name] = dataclasses.replace(pair, magnitude=norm * torch.linspace(0.7, 1.4, norm.numel()).view_as(norm))
    return made


def decomposed(weight: Tensor, pair: Pair) -> Tensor:
    """Eq. 5 of DoRA in float64."""
    up, down = pair.up.double().flatten(1), pair.down.double().flatten(1)
    moved = weight.double() + pair.scale * torch.einsum("or,ri->oi", up, down).view_as(weight)
    if pair.magnitude is None:
        return moved
    outputs = pair.magnitude.shape[1] == 1
    rows = moved.flatten(1) if outputs else moved.transpose(0, 1).flatten(1)
    norm = rows.square().sum(dim=1).sqrt().view_as(pair.magnitude)
    return pair.magnitude.double() * moved / norm


def attention(name: str) -> bool:
    return ".attn" in name or ".self_attn." in name


def split(name: str) -> tuple[str, str]:
    component, _, path = name.partition(".")
    return component, path


def kohya(pairs: Pairs, prefix: str = "lora_te_", rename: Callable[[str], str] = str) -> Tensors:
    tensors = {}
    for name, pair in pairs.items():
        component, path = split(name)
        path = f"text_model.{path}" if component != "unet" else rename(path)
        key = ("lora_unet_" if component == "unet" else prefix) + path.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": pair.down, f"{key}.lora_up.weight": pair.up, f"{key}.alpha": torch.tensor(ALPHA)}
        tensors |= {} if pair.magnitude is None else {f"{key}.dora_scale": pair.magnitude}
    return tensors


def dotted(pairs: Pairs, down: str, up: str, *, alpha: bool = True) -> Tensors:
    tensors = {}
    for name, pair in pairs.items():
        component, path = split(name)
        key = f"{component}." + (path if component == "unet" else f"text_model.{path}")
        tensors |= {f"{key}.{down}.weight": pair.down, f"{key}.{up}.weight": pair.up}
        if alpha:
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
        if pair.magnitude is not None:  # PEFT's shapes
            turned = pair.magnitude.flatten() if pair.magnitude.ndim == 2 else pair.magnitude.transpose(0, 1)
            tensors[f"{key}.lora_magnitude_vector"] = turned
    return tensors


def processors(pairs: Pairs) -> Tensors:
    """diffusers up to 0.16, attention only; text encoders' layers were called as the U-Net's."""
    old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out.0": "to_out"}
    tensors = {}
    for name, pair in pairs.items():
        component, path = split(name)
        cut = path.rindex(".to_" if component == "unet" else ".")
        parent, last = path[:cut], path[cut + 1 :]
        parent = f"{parent}.processor" if component == "unet" else f"text_model.{parent}"
        key = f"{component}.{parent}.{old.get(last, last)}_lora"
        tensors |= {f"{key}.down.weight": pair.down, f"{key}.up.weight": pair.up}
    return tensors


def to_compvis(path: str) -> str:
    """Of the toy U-Net: two levels of two res blocks, attention on the first."""
    from ldmkit.checkpoints.compvis import unet_map

    source = unet_map(levels=2, layers_per_block=2, attention=(True, False)).source(f"{path}.weight")
    assert source is not None
    return source[0].removesuffix(".weight")


FORMATS: dict[str, Callable[[Pairs], Tensors]] = {
    "kohya": kohya,
    "kohya, first of two encoders": lambda pairs: kohya(pairs, "lora_te1_"),
    "kohya, second of two encoders": lambda pairs: kohya(pairs, "lora_te2_"),
    "kohya on Stability's names": lambda pairs: kohya(pairs, rename=to_compvis),
    "diffusers and PEFT": lambda pairs: dotted(pairs, "lora_A", "lora_B"),
    "PEFT with the adapter's name": lambda pairs: dotted(pairs, "lora_A.default", "lora_B.default"),
    "diffusers 0.17": lambda pairs: dotted(pairs, "lora.down", "lora.up"),
    "diffusers 0.20": lambda pairs: dotted(pairs, "lora_linear_layer.down", "lora_linear_layer.up"),
}


def assert_same(found: Pairs, wanted: Pairs) -> None:
    assert found.keys() == wanted.keys()
    for name, pair in wanted.items():
        assert (found[name].magnitude is None) == (pair.magnitude is None), name
        assert pair.magnitude is None or torch.equal(found[name].magnitude, pair.magnitude), name
        assert torch.equal(found[name].down, pair.down), name
        assert torch.equal(found[name].up, pair.up), name
        assert found[name].scale == pair.scale, name


@pytest.mark.parametrize("style", FORMATS)
def test_names(pipe: Pipeline, style: str) -> None:
    layers = layers_of(pipe)
    pairs = draw(layers)
    assert {split(name)[0] for name in pairs} == {"unet", "text_encoder"}
    assert {type(layer) for layer in layers.by_name.values()} == {nn.Linear, nn.Conv2d}
    tensors = FORMATS[style](pairs)
    found, accounting = pairs_of(read_lora(tensors), layers, model="toy")
    assert_same(found, pairs)
    assert set(accounting.mapped.values()) == tensors.keys()


@pytest.mark.parametrize(("style", "axis"), [("kohya", 0), ("kohya", 1), ("diffusers and PEFT", 0)])
def test_names_of_magnitudes(pipe: Pipeline, style: str, axis: int) -> None:
    """DoRA as LyCORIS and OneTrainer write it, by outputs or inputs, and as PEFT and diffusers do."""
    layers = layers_of(pipe)
    pairs = with_magnitudes(draw(layers), layers, axis)
    tensors = FORMATS[style](pairs)
    found, accounting = pairs_of(read_lora(tensors), layers, model="toy")
    assert_same(found, pairs)
    assert set(accounting.mapped.values()) == tensors.keys()


def test_names_of_attention_processors(pipe: Pipeline) -> None:
    layers = layers_of(pipe)
    pairs = draw(layers, attention, alpha=RANK)
    tensors = processors(pairs)
    assert_same(pairs_of(read_lora(tensors), layers, model="toy")[0], pairs)
    unet = {key.removeprefix("unet."): tensor for key, tensor in tensors.items() if key.startswith("unet.")}
    wanted = {name: pair for name, pair in pairs.items() if name.startswith("unet.")}
    assert_same(pairs_of(read_lora(unet), layers, model="toy")[0], wanted)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 2 / 3),
        ({"use_rslora": True}, 2 / 3**0.5),
        ({"alpha_pattern": {"to_k": 9, "to_q": 6}}, 2.0),
        ({"alpha_pattern": {"^to_q": 9, r"attn1\.to_q$": 6}}, 2.0),
    ],
)
def test_scale_of_peft(pipe: Pipeline, tmp_path: Path, settings: dict[str, Any], scale: float) -> None:
    """PEFT's own files have no component and no alpha; diffusers' metadata say the same by component."""
    layers = layers_of(pipe)
    pairs = draw(layers, lambda name: name.endswith("attn1.to_q"))
    raw = {f"base_model.model.{key[5:]}": value for key, value in dotted(pairs, "lora_A", "lora_B", alpha=False).items()}
    save_file(raw, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        pairs_of(read_lora(tmp_path), layers, model="toy")
    told = {"r": RANK, "lora_alpha": 2, **settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    found, _ = pairs_of(read_lora(tmp_path), layers, model="toy")
    assert {round(pair.scale, 12) for pair in found.values()} == {round(scale, 12)}
    flat = json.dumps({f"unet.{key}": value for key, value in told.items()})
    named = dotted(pairs, "lora_A", "lora_B", alpha=False)
    save_file(named, tmp_path / "named.safetensors", metadata={"lora_adapter_metadata": flat})
    found, _ = pairs_of(read_lora(tmp_path / "named.safetensors"), layers, model="toy")
    assert {round(pair.scale, 12) for pair in found.values()} == {round(scale, 12)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": "two"}, "lora_alpha = 'two'"),
        ({"alpha_pattern": [1]}, "must map names"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "only names of layers"),
        ({"use_dora": True}, "says use_dora, and there is no lora_magnitude_vector of unet.conv_in"),
    ],
)
def test_settings_that_cannot_be_served(pipe: Pipeline, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    layers = layers_of(pipe)
    pairs = {"unet.conv_in": Pair(torch.zeros(1, 4, 3, 3), torch.zeros(16, 1, 1, 1), 1.0)}
    tensors = dotted(pairs, "lora_A", "lora_B", alpha=False)
    raw = {key.replace("unet.", "base_model.model."): value for key, value in tensors.items()}
    save_file(raw, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        pairs_of(read_lora(tmp_path), layers, model="toy")


def test_two_text_encoders(pipe: Pipeline) -> None:
    """In the order in which they are registered, whatever they are called."""
    both = nn.ModuleDict({"one": copy.deepcopy(pipe.conditioner), "two": copy.deepcopy(pipe.conditioner)})
    layers = Layers(pipe.denoiser, both)
    pairs = draw(layers, lambda name: name.startswith("text_encoder"))
    assert {split(name)[0] for name in pairs} == {"text_encoder", "text_encoder_2"}
    assert layers.by_name["text_encoder_2.encoder.layers.0.mlp.fc1"] is both["two"].encoder.layers[0].mlp.fc1
    first, second = ({n: p for n, p in pairs.items() if split(n)[0] == which} for which in ("text_encoder", "text_encoder_2"))
    tensors = {**kohya(first, "lora_te1_"), **kohya(second, "lora_te2_")}
    assert_same(pairs_of(read_lora(tensors), layers, model="toy")[0], pairs)


def test_pickles_on_request(pipe: Pipeline, tmp_path: Path) -> None:
    layers = layers_of(pipe)
    pairs = draw(layers)
    torch.save(kohya(pairs), tmp_path / "style.bin")
    with pytest.raises(CheckpointError, match="allow_pickle"):
        pipe.load_lora_weights(tmp_path / "style.bin")
    found, _ = pairs_of(read_lora(tmp_path / "style.bin", allow_pickle=True), layers, model="toy")
    assert_same(found, pairs)


def test_every_layer_of_sdxl_under_stabilitys_names(shared: Path) -> None:
    shapes = json.loads((shared / "data" / "key_shapes" / "sgm_keys_sd_xl_base.json").read_text())
    layers = Layers(skeleton(UNet, UNet.Config.parse(PRESETS["sdxl"])), None)
    start = "model.diffusion_model."
    names = [
        key[len(start) :].removesuffix(".weight") for key, shape in shapes.items() if key.startswith(start) and len(shape) > 1
    ]
    found = [layers.place(f"lora_unet_{name.replace('.', '_')}.lora_down.weight") for name in names]
    assert {place.layer for place in found if place} == layers.by_name.keys()
    assert len(names) == len(layers.by_name)


# -------------------------------------------------------------------------------------------------------------- real files


def full_size(shared: Path) -> Layers:
    """Stable Diffusion 1.5 without memory for its weights."""
    tokenizer = shared / "data" / "checkpoints"
    vocab = next(path for path in sorted(tokenizer.rglob("vocab.json")) if (path.parent / "merges.txt").exists())
    config = CLIPTextConditioner.Config(vocab=str(vocab), merges=str(vocab.parent / "merges.txt"))
    return Layers(skeleton(UNet, UNet.Config()), skeleton(CLIPTextConditioner, config))


@pytest.mark.parametrize(("name", "embeddings"), [("analog_svd_rank4", 0), ("lora_disney", 2)])
def test_files_from_the_wild(shared: Path, name: str, embeddings: int) -> None:
    """cloneofsimo's numbers: shapes fit only where the order of the layers is the one they were trained in."""
    file = read_lora(shared / "data" / "lora" / f"{name}.safetensors")
    pairs, accounting = pairs_of(file, full_size(shared), model="Stable Diffusion 1.5")
    assert len(pairs) == 144 + 48
    assert len(accounting.mapped) == 2 * len(pairs)
    assert len(accounting.ignored) == embeddings
    assert accounting.mapped["unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.up"] == "unet:139:up"
    assert accounting.mapped["text_encoder.encoder.layers.1.self_attn.q_proj.up"] == "text_encoder:6:up"
    other = dataclasses.replace(file, metadata={**file.metadata, "unet": '["CrossAttention", "ResnetBlock2D"]'})
    with pytest.raises(CheckpointError, match="ResnetBlock2D"):
        pairs_of(other, full_size(shared), model="Stable Diffusion 1.5")


def test_inspected(shared: Path, tmp_path: Path, pipe: Pipeline) -> None:
    found = inspect(shared / "data" / "lora" / "lora_disney.safetensors")
    assert (found.architecture, found.layout) == ("LoRA of rank 1 for Stable Diffusion 1", "cloneofsimo's numbers")
    assert [(part.name, part.keys) for part in found.components] == [("unet", 288), ("text_encoder", 96)]
    assert sorted(found.ignored) == ["<s1>", "<s2>"]
    assert not found.unknown
    save_file({**kohya(draw(layers_of(pipe))), "more": torch.zeros(1)}, tmp_path / "style.safetensors")
    found = inspect(tmp_path / "style.safetensors")
    assert (found.architecture, found.layout, found.unknown) == ("LoRA of rank 3", "kohya's names", ["more"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["analog_svd_rank4", "lora_disney"])
def test_files_from_the_wild_fuse_and_unfuse(shared: Path, name: str) -> None:
    """At full size, in float16: only the adapted layers are given memory."""
    layers = full_size(shared)
    pairs, _ = pairs_of(read_lora(shared / "data" / "lora" / f"{name}.safetensors"), layers, model="Stable Diffusion 1.5")
    touched = [layers.by_name[layer] for layer in pairs]
    before = []
    for layer in touched:
        layer.to_empty(device="cpu").half()
        nn.init.normal_(layer.weight, std=0.03)
        before.append(layer.weight.detach().clone())
    held = Adapters({name: Adapter([(layers.by_name[layer], pair) for layer, pair in pairs.items()], 0.8)})
    held.attach()
    held.fuse(1.0)
    for (layer, pair), old in zip(held.loaded[name].pairs, before, strict=True):
        change = 0.8 * pair.scale * pair.up.double() @ pair.down.double()
        assert_rounded(layer.weight, old.double() + change)
    assert any(not torch.equal(layer.weight, old) for layer, old in zip(touched, before, strict=True))
    held.unfuse()
    assert all(torch.equal(layer.weight, old) for layer, old in zip(touched, before, strict=True))


# --------------------------------------------------------------------------------------------------------------- in pictures


def merged(peer: Any, pairs: Pairs, weight: float) -> Any:
    """diffusers with the change in its weights, in float64."""
    wide = copy.deepcopy(peer).to(torch.float64)
    for name, pair in pairs.items():
        component, path = split(name)
        layer = getattr(wide, component).get_submodule(path)
        up, down = (side.double().flatten(1) for side in (pair.up, pair.down))
        with torch.no_grad():
            layer.weight += weight * pair.scale * (up @ down).view_as(layer.weight)
    return wide


def test_pictures(peer: Any, pipe: Pipeline, tmp_path: Path) -> None:
    """Beside the weights and merged into them, against diffusers whose weights were changed in float64."""
    plain = latents(pipe)
    pairs = draw(layers_of(pipe))
    wide = merged(peer, pairs, 0.7)
    theirs = latents(copy.deepcopy(wide).to(torch.float32))
    with in_float64():
        wide.scheduler = type(peer.scheduler).from_config(peer.scheduler.config)
        oracle = latents(wide, dtype=torch.float64)
    save_file(kohya(pairs), tmp_path / "style.safetensors")
    assert pipe.load_lora_weights(tmp_path / "style.safetensors", weight=0.7) == "default_0"
    assert pipe.accounting["lora default_0"].complete
    assert not torch.allclose(theirs, plain, atol=0.1)
    assert_as_accurate(latents(pipe), theirs, oracle, what="beside the weights")
    pipe.fuse_lora()
    assert_as_accurate(latents(pipe), theirs, oracle, what="fused")
    again = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "fused"))
    assert torch.equal(latents(again), latents(pipe))
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), plain)
    assert pipe.adapters == {}


def test_pictures_as_with_peft(peer: Any, pipe: Pipeline, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="diffusers loads LoRA through peft: pip install peft")
    first = dotted(draw(layers_of(pipe), attention, seed=1, alpha=RANK), "lora_A", "lora_B", alpha=False)
    second = kohya(draw(layers_of(pipe), lambda name: attention(name) or "resnets" in name, seed=2))
    other = copy.deepcopy(peer)
    with in_float64():
        wide = copy.deepcopy(peer).to(torch.float64)
        wide.scheduler = type(peer.scheduler).from_config(peer.scheduler.config)
    for target in (other, wide, pipe):
        for name, tensors in (("one", first), ("two", second)):
            target.load_lora_weights(dict(tensors), adapter_name=name)
        target.set_adapters(["one", "two"], [0.5, -0.8])
    wide.to(torch.float64)
    with in_float64():
        oracle = latents(wide, dtype=torch.float64)
    assert_as_accurate(latents(pipe), latents(other), oracle)


def test_pictures_of_dora_as_with_peft(peer: Any, pipe: Pipeline) -> None:
    pytest.importorskip("peft", reason="diffusers loads DoRA through peft: pip install peft")
    layers = layers_of(pipe)
    unet = draw(layers, lambda name: name.startswith("unet") and (attention(name) or "resnets" in name), seed=1, alpha=RANK)
    tensors = dotted(with_magnitudes(unet, layers, 0), "lora_A", "lora_B", alpha=False)
    other = copy.deepcopy(peer)
    with in_float64():
        wide = copy.deepcopy(peer).to(torch.float64)
        wide.scheduler = type(peer.scheduler).from_config(peer.scheduler.config)
    plain = latents(pipe)
    for target in (other, wide, pipe):
        target.load_lora_weights(dict(tensors))
    wide.to(torch.float64)
    with in_float64():
        oracle = latents(wide, dtype=torch.float64)
    assert not torch.allclose(plain.double(), oracle, atol=0.1)
    assert_as_accurate(latents(pipe), latents(other), oracle, what="beside the weights")
    pipe.fuse_lora()
    assert_as_accurate(latents(pipe), latents(other), oracle, what="fused")
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_goes_a_straight_way_beside_other_adapters(axis: int) -> None:
    """Beside the weights and merged, by the formula; a row of zeros has no direction and stays zero."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 6, 3, stride=2, padding=1)
    net = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 1), convolution, nn.Conv2d(4, 2, 1)]).double()
    layers = object.__new__(Layers)
    layers.by_name = {str(i): layer for i, layer in enumerate(net)}
    inputs = [torch.randn(shape).double() for shape in ((2, 5), (2, 5), (2, 3, 8, 8), (2, 4, 3, 3))]
    first, second = draw(layers, seed=1), draw(layers, seed=2)
    first = with_magnitudes(first, layers, axis)
    held = Adapters(
        {
            "dora": Adapter([(layers.by_name[name], pair) for name, pair in first.items()], 0.3),
            "lora": Adapter([(layers.by_name[name], pair) for name, pair in second.items()], -0.6),
        }
    )
    exact = []
    for name, layer in layers.by_name.items():
        weight = layer.weight.detach()
        dora, lora = (decomposed(weight, pairs[name]) - weight for pairs in (first, second))
        exact.append(weight + 0.3 * dora - 0.6 * lora)
    wanted = copy.deepcopy(net)
    for layer, weight in zip(wanted, exact, strict=True):
        layer.weight.data = weight
    held.attach()
    for layer, other, x in zip(net, wanted, inputs, strict=True):
        torch.testing.assert_close(layer(x), other(x), rtol=1e-12, atol=1e-12)
    held.fuse(1.0)
    for layer, weight in zip(net, exact, strict=True):
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-13, atol=1e-13)
    nothing = directions(torch.zeros(4, 5), torch.zeros(1, 5), torch.zeros(4, 1), scale=1.0, magnitude=torch.ones(4, 1))
    assert torch.equal(nothing, torch.zeros(4, 1))


def test_several_at_once(pipe: Pipeline) -> None:
    plain = latents(pipe)
    for seed in (1, 2):
        pipe.load_lora_weights(kohya(draw(layers_of(pipe), seed=seed)), f"lora{seed}", weight=seed / 4)
    assert pipe.adapters == {"lora1": 0.25, "lora2": 0.5}
    both = latents(pipe)
    pipe.set_adapters("lora2", 0.5)
    assert pipe.adapters == {"lora1": 0.0, "lora2": 0.5}
    second = latents(pipe)
    pipe.set_adapters(["lora2", "lora1"], [0.5, 0.25])
    assert torch.equal(latents(pipe), both)
    pipe.unload_lora_weights("lora1")
    assert torch.equal(latents(pipe), second)
    pipe.set_adapters([])
    assert torch.equal(latents(pipe), plain)
    assert len({float(x.sum()) for x in (plain, both, second)}) == 3


def test_the_feed_forward_is_fused_where_it_is_plain(pipe: Pipeline) -> None:
    def ops() -> set[str]:
        with record() as calls:
            latents(pipe)
        return {call.op for call in calls}

    assert "geglu_linear" in ops()
    pipe.load_lora_weights(kohya(draw(layers_of(pipe), lambda name: name.endswith("ff.net.0.proj"))))
    assert "geglu_linear" not in ops()
    pipe.fuse_lora()
    assert "geglu_linear" in ops()


def test_the_state_dict_stays_and_adapters_move_with_the_pipeline(pipe: Pipeline) -> None:
    names = [list(module.state_dict()) for module in pipe.modules.values()]
    pipe.load_lora_weights(kohya(draw(layers_of(pipe))))
    assert [list(module.state_dict()) for module in pipe.modules.values()] == names
    pipe.to(torch.float64)
    assert latents(pipe, dtype=torch.float64).dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------------- reversible


def assert_rounded(weight: Tensor, exact: Tensor) -> None:
    """Each number is the exact one, rounded once (twice where torch goes through float32)."""
    finfo = torch.finfo(weight.dtype)
    error = (weight.double() - exact).abs()
    assert bool((error <= 0.51 * finfo.eps * exact.abs() + finfo.smallest_normal * finfo.eps).all())


@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.floats(-2, 2), min_size=1, max_size=3),
    axes=st.lists(st.sampled_from([None, 0, 1]), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_merged_to_rounding_and_restored_bit_for_bit(
    seed: int, weights: list[float], axes: list[int | None], dtype: torch.dtype
) -> None:
    """LoRA, and DoRA by outputs or inputs."""
    torch.manual_seed(seed)
    net = nn.ModuleList([nn.Linear(5, 4), nn.Conv2d(3, 6, 3, stride=2), nn.Conv2d(4, 2, 1)]).to(dtype)
    names = {str(i): layer for i, layer in enumerate(net)}
    before = {key: value.clone() for key, value in net.state_dict().items()}
    held = Adapters()
    for k, weight in enumerate(weights):
        layers = object.__new__(Layers)
        layers.by_name = names
        pairs, axis = draw(layers, seed=seed + k), axes[k]
        pairs = pairs if axis is None else with_magnitudes(pairs, layers, axis)
        held.loaded[f"a{k}"] = Adapter([(names[name], pair) for name, pair in pairs.items()], weight)
    held.attach()
    held.fuse(0.5)
    for i, layer in enumerate(net):
        assert type(layer) in (nn.Linear, nn.Conv2d)
        exact = before[f"{i}.weight"].double()
        for adapter in held.loaded.values():
            plain = before[f"{i}.weight"].double()
            exact = exact + 0.5 * adapter.weight * (decomposed(plain, adapter.pairs[i][1]) - plain)
        assert_rounded(layer.weight, exact)
    held.unfuse()
    held.detach(list(held.loaded))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert [type(layer) for layer in net] == [nn.Linear, nn.Conv2d, nn.Conv2d]


# -------------------------------------------------------------------------------------------------------------------- errors


def spoil(tensors: Tensors, how: str) -> Tensors:
    down = next(key for key in tensors if key.endswith("lora_down.weight"))
    up = down.replace("lora_down", "lora_up")
    if how == "unexpected":
        return {**tensors, "lora_unet_elsewhere.lora_down.weight": torch.zeros(3, 3)}
    if how == "missing":
        return {key: value for key, value in tensors.items() if key != up}
    if how == "shape":
        return {**tensors, up: torch.zeros(5, 5)}
    if how == "nan":
        return {**tensors, down: tensors[down] * float("nan")}
    if how == "integers":
        return {**tensors, down: tensors[down].int()}
    if how == "twice":
        return {**tensors, "unet.conv_in.lora_A.weight": torch.zeros(RANK, 4, 3, 3)}
    if how == "magnitude":
        return {**tensors, "lora_unet_conv_in.dora_scale": torch.ones(5)}
    if how == "loha":
        return {**tensors, "lora_unet_conv_in.hada_w1_a": torch.ones(16, 3)}
    return {}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unexpected", "unexpected  lora_unet_elsewhere"),
        ("missing", "missing     unet.conv_in.up"),
        ("shape", r"shape       unet.conv_in.up: file \(5, 5\), model \(16, 3, 1, 1\)"),
        ("nan", "lora_unet_conv_in.lora_down.weight holds .* NaN"),
        ("integers", "floating-point"),
        ("twice", "are both the down of unet.conv_in"),
        ("magnitude", r"shape       unet.conv_in.magnitude: file \(5,\), model \(16, 1\)"),
        ("loha", "another kind .hada_w1_a"),
        ("empty", "holds no LoRA weights"),
    ],
)
def test_what_does_not_fit_changes_nothing(pipe: Pipeline, how: str, message: str) -> None:
    tensors = spoil(kohya(draw(layers_of(pipe))), how)
    with pytest.raises(CheckpointError, match=message):
        pipe.load_lora_weights(tensors)
    assert all(type(layer) in (nn.Linear, nn.Conv2d) for layer in layers_of(pipe).by_name.values())
    assert pipe.adapters == {}


def test_fusing_that_fails_leaves_all_as_it_was(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.load_lora_weights(kohya(draw(layers_of(pipe))), "style")
    before = latents(pipe)
    calls: list[torch.device] = []

    def exact(device: torch.device) -> torch.device:
        calls.append(device)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory left")
        return device

    monkeypatch.setattr("ldmkit.adapters._exact", exact)
    with pytest.raises(torch.OutOfMemoryError):
        pipe.fuse_lora()
    assert torch.equal(latents(pipe), before)
    assert pipe.adapters == {"style": 1.0}
    pipe.fuse_lora()


def test_unexpected_keys_are_left_out_on_request(pipe: Pipeline) -> None:
    tensors = spoil(kohya(draw(layers_of(pipe))), "unexpected")
    with pytest.raises(ArchitectureMismatchError):
        pipe.load_lora_weights(tensors)
    with pytest.warns(UnexpectedKeysWarning, match="lora_unet_elsewhere"):
        pipe.load_lora_weights(tensors, "style", strict=False)
    assert "lora_unet_elsewhere.lora_down.weight" in pipe.accounting["lora style"].ignored


def test_a_denoiser_without_text(pipe: Pipeline) -> None:
    alone = Pipeline(autoencoder="identity", denoiser={"name": "unet", "cross_attention_dim": None, "in_channels": 3,
                     "out_channels": 3, "block_out_channels": [8], "norm_num_groups": 4, "num_attention_heads": 2,
                     "transformer_layers_per_block": [1]})  # fmt: skip
    with pytest.raises(ArchitectureMismatchError, match="lora_te_text_model"):
        alone.load_lora_weights(kohya(draw(layers_of(pipe))))
    alone.load_lora_weights(kohya(draw(Layers(alone.denoiser, None))))
    assert alone.adapters == {"default_0": 1.0}


def test_errors(pipe: Pipeline, tmp_path: Path) -> None:
    tensors = kohya(draw(layers_of(pipe)))
    with pytest.raises(InputTypeError, match="must be a file"):
        pipe.load_lora_weights(5)  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="names to tensors"):
        pipe.load_lora_weights({"a": 1})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="holds none"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(InputError, match="without dots"):
        pipe.load_lora_weights(tensors, "a.b")
    with pytest.raises(InputError, match="is taken"):
        pipe.load_lora_weights(tensors, "training")
    with pytest.raises(InputError, match="finite"):
        pipe.load_lora_weights(tensors, weight=float("nan"))
    with pytest.raises(InputError, match="no LoRA to fuse"):
        pipe.fuse_lora()
    with pytest.raises(InputError, match="no LoRA is fused"):
        pipe.unfuse_lora()
    pipe.load_lora_weights(tensors, "style")
    with pytest.raises(InputError, match="is taken"):
        pipe.load_lora_weights(tensors, "style")
    with pytest.raises(InputError, match=r"'other'; loaded are style"):
        pipe.set_adapters(["style", "other"])
    with pytest.raises(InputError, match="given twice"):
        pipe.set_adapters(["style", "style"])
    with pytest.raises(InputError, match="1 names and 2 weights"):
        pipe.set_adapters(["style"], [1.0, 2.0])
    with pytest.raises(InputTypeError, match="must be a number"):
        pipe.set_adapters("style", [True])
    with pytest.raises(InputError, match="would not be saved"):
        pipe.save_pretrained(tmp_path / "pipe")
    pipe.fuse_lora()
    for call in (pipe.fuse_lora, lambda: pipe.set_adapters("style"), lambda: pipe.unload_lora_weights("style")):
        with pytest.raises(InputError, match="unfuse_lora first"):
            call()
    with pytest.raises(InputError, match="unfuse_lora first"):
        pipe.load_lora_weights(tensors)


def test_fused_weights_are_diffusers_too(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.load_lora_weights(kohya(draw(layers_of(pipe))))
    pipe.fuse_lora()
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(pipe.save_pretrained(tmp_path / "sd", format="diffusers"))
    weights = theirs.unet.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in pipe.denoiser.state_dict().items())
