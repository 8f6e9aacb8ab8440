"""Key maps: every published name has exactly one other, and the way back leads to where it came from."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ldmkit.checkpoints.compvis import clip_map, ldm_bert_map, open_clip_map, unet_map, vae_map
from ldmkit.checkpoints.keymap import KeyMap, Rule
from ldmkit.checkpoints.recognise import recognise
from ldmkit.errors import ArchitectureMismatchError, CheckpointError

FULL_SIZE = {
    "compvis_keys_sd1": {"unet": "diffusers_keys_sd15_unet", "vae": "diffusers_keys_sd15_vae"},
    "sd2_keys_v2-inference": {"unet": None},
    "sgm_keys_sd_xl_base": {"unet": "diffusers_keys_sdxl-base_unet"},
}
"""Recorded lists in the CompVis or Stability layout; those of the same models in the diffusers layout where there are any."""

TEXT = "diffusers_keys_sd15_text"
"""CLIP-L's, without `text_model.`"""


def recorded(shared: Path, name: str) -> dict[str, tuple[int, ...]]:
    text = (shared / f"data/key_shapes/{name}.json").read_text()
    return {key: tuple(shape) for key, shape in json.loads(text).items()}


def on_meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def converted(keymap: KeyMap, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All that the map knows, under our names."""
    return {ours: rule.take(tensor) for key, tensor in tensors.items() for ours, rule in keymap.targets(key)}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_published_lists_map_completely_and_back(shared: Path, name: str) -> None:
    theirs = recorded(shared, name)
    found = {component.name: component for component in recognise(theirs)}
    assert set(found) == set(FULL_SIZE[name])
    known: set[str] = set()
    for component, expected in FULL_SIZE[name].items():
        keymap = found[component].keymap
        own = {key: tensor for key, tensor in on_meta(theirs).items() if keymap.targets(key)}
        ours = converted(keymap, own)
        if expected is not None:
            assert {key: tuple(tensor.shape) for key, tensor in ours.items()} == recorded(shared, expected)
        back = keymap.restore(ours)
        assert {key: tensor.shape for key, tensor in back.items()} == {key: tensor.shape for key, tensor in own.items()}
        known |= set(own)
    assert known == set(theirs)


@pytest.mark.parametrize("name", [list_ for lists in FULL_SIZE.values() for list_ in lists.values() if list_])
def test_published_diffusers_lists_map_to_theirs_and_back(shared: Path, name: str) -> None:
    """The other way first: from the diffusers layout, through a map made for what is there."""
    ours = recorded(shared, name)
    source = next(source for source, lists in FULL_SIZE.items() if name in lists.values())
    kind = next(kind for kind, list_ in FULL_SIZE[source].items() if list_ == name)
    keymap = next(found.keymap for found in recognise(recorded(shared, source)) if found.name == kind)
    theirs = keymap.restore(on_meta(ours))
    assert {key: tuple(tensor.shape) for key, tensor in converted(keymap, theirs).items()} == ours


def test_the_published_list_of_clip_s_keys_maps_to_compvis_s_and_back(shared: Path) -> None:
    """Names in a Stable Diffusion 1 file, with and without `text_model.`; recognised beside the other two components."""
    ours = recorded(shared, TEXT)
    for nested in (True, False):
        theirs = clip_map(nested=nested).prefixed("cond_stage_model.transformer").restore(on_meta(ours))
        assert len(theirs) == len(ours)
        assert all(("text_model." in key) == nested for key in theirs)
        whole = recorded(shared, "compvis_keys_sd1") | {key: tuple(tensor.shape) for key, tensor in theirs.items()}
        found = {component.name: component for component in recognise(whole)}
        assert set(found) == {"unet", "vae", "text_encoder"}
        back = converted(found["text_encoder"].keymap, theirs)
        assert {key: tuple(tensor.shape) for key, tensor in back.items()} == ours


def test_every_published_list_is_tested(shared: Path) -> None:
    tested = {*FULL_SIZE, *(list_ for lists in FULL_SIZE.values() for list_ in lists.values() if list_), TEXT}
    assert tested == {path.stem for path in (shared / "data/key_shapes").glob("*.json")}


@st.composite
def maps(draw: st.DrawFn) -> KeyMap:
    levels, layers = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    attention = tuple(draw(st.lists(st.booleans(), min_size=levels, max_size=levels)))
    heads = draw(st.none() | st.lists(st.sampled_from([2, 4]), min_size=levels, max_size=levels))
    resampled = draw(st.booleans())
    made = draw(
        st.sampled_from(
            [
                unet_map(
                    levels=levels,
                    layers_per_block=layers,
                    attention=attention,
                    plain_head_channels=heads,
                    resnet_resampling=resampled,
                ),
                vae_map(levels=levels, layers_per_block=layers),
                clip_map(nested=draw(st.booleans())),
                open_clip_map(layers=layers),
                ldm_bert_map(layers=layers),
            ]
        )
    )
    return made.prefixed(draw(st.sampled_from(["", "model", "a.b"])), draw(st.sampled_from(["", "two"])))


@given(keymap=maps(), data=st.data())
def test_the_way_back_is_the_inverse(keymap: KeyMap, data: st.DataObject) -> None:
    """Keys, shapes and every number, for any map and any of its keys with anything below."""
    rule = data.draw(st.sampled_from(keymap.rules))
    below = data.draw(st.sampled_from([".weight", ".bias", ".0.weight", ""]))
    tail = (1,) * rule.axes if data.draw(st.booleans()) else ()
    rows, columns = 8 * rule.pieces, data.draw(st.integers(1, 3))
    shape = (rows,) if below == ".bias" else (rows, columns, *(1,) * rule.axes) if rule.axes else (rows, columns, *tail)
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    key = rule.theirs + below
    targets = keymap.targets(key)
    ours = {name: target.take(tensor) for name, target in targets}
    assert len(ours) == len(targets) == keymap.targets(key)[0][1].pieces
    assert [keymap.source(name) for name, _ in targets] == [(key, target) for _, target in targets]
    back = keymap.restore(ours)
    assert list(back) == [key]
    assert torch.equal(back[key], tensor)


@given(keymap=maps())
def test_no_two_names_meet(keymap: KeyMap) -> None:
    keys = {f"{rule.theirs}.weight" for rule in keymap.rules}
    targets = [name for key in keys for name, _ in keymap.targets(key)]
    assert len(targets) == len(set(targets)) == len(keymap.rules)


def test_open_clip_packs_queries_keys_and_values() -> None:
    packed = torch.arange(24.0).reshape(12, 2)
    got = {
        name: rule.take(packed) for name, rule in open_clip_map(layers=1).targets("transformer.resblocks.0.attn.in_proj_weight")
    }
    assert list(got) == [f"encoder.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    assert torch.equal(torch.cat(list(got.values())), packed)


def test_plain_attention_packs_head_by_head() -> None:
    """Dhariwal and Nichol's QKVAttentionLegacy: for every head its queries, its keys, its values."""
    packed = torch.arange(12.0).reshape(12, 1, 1)  # two heads of two channels
    keymap = unet_map(levels=1, layers_per_block=1, attention=(True,), plain_head_channels=[2])
    got = [rule.take(packed).flatten().tolist() for _, rule in keymap.targets("middle_block.1.qkv.weight")]
    assert got == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def test_what_a_map_does_not_know() -> None:
    keymap = vae_map(levels=2, layers_per_block=1)
    assert keymap.targets("encoder.down.2.block.0.norm1.weight") == []
    assert keymap.source("conv_in.weight") is None
    with pytest.raises(CheckpointError, match=r"no name in the other layout for a\.b, c"):
        keymap.restore({"c": torch.zeros(1), "a.b": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="is made of 3 tensors, of which only 1 are there"):
        open_clip_map(layers=1).restore({"encoder.layers.0.self_attn.q_proj.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match="two rules lead to 'b'"):
        KeyMap([Rule("a", "b"), Rule("c", "b")])
    with pytest.raises(ValueError, match="pieces of 'a'"):
        KeyMap([Rule("a", "b", piece=1, pieces=2)])
    with pytest.raises(CheckpointError, match="has 10 rows, which are not 3 equal pieces"):
        Rule("a", "b", pieces=3).take(torch.zeros(10, 2))


def test_what_is_no_single_file() -> None:
    with pytest.raises(ArchitectureMismatchError, match="the first are down_blocks"):
        recognise({"down_blocks.0.weight": (1,)})
    with pytest.raises(ArchitectureMismatchError, match=r"the autoencoder lacks decoder\.conv_out\.weight"):
        recognise({"first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3)})
    with pytest.raises(ArchitectureMismatchError, match="0 input blocks on 1 levels"):
        recognise({"model.diffusion_model.out.2.weight": (4, 3, 3, 3)})
