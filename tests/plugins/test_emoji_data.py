"""The emoji data: every glyph, honest splits, captions that the vocabulary spells, the same bytes every time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageFont
from tokenizers.implementations import BertWordPieceTokenizer

from ldmkit.errors import DataError, InputError, MissingDependencyError
from ldmkit_emoji import captions, data, glyphs, scenes
from ldmkit_emoji.captions import COLOURS
from ldmkit_emoji.glyphs import Emoji, Glyphs
from ldmkit_emoji.vocabulary import vocabulary

VOCAB = Path(data.__file__).parent / "recipes" / "vocab.txt"
ZWJ = "\u200d"


@pytest.fixture(scope="session")
def every_glyph() -> Glyphs:
    """All emoji, drawn."""
    try:
        return glyphs.load()
    except MissingDependencyError as error:
        pytest.skip(f"no emoji to draw: {error}")


@pytest.fixture(scope="session")
def tokenizer() -> BertWordPieceTokenizer:
    """WordPiece with the committed vocabulary."""
    return BertWordPieceTokenizer(str(VOCAB), lowercase=True)


# ------------------------------------------------------------------------------------------------------------------- pictures


def test_every_fully_qualified_emoji_has_a_picture_of_its_own_look(every_glyph: Glyphs) -> None:
    assert len(every_glyph) == 3655
    assert len({e.name for e in every_glyph.emoji}) == 3655
    covered_N = (every_glyph.rgba_NHWC[..., 3] > 127).mean(axis=(1, 2))
    assert covered_N.min() > 0.02, every_glyph.emoji[int(covered_N.argmin())].name
    assert covered_N.max() < 0.95
    assert not every_glyph.rgba_NHWC[:, :, [0, -1]].any(), "a margin is free on the left and on the right"
    assert not every_glyph.rgba_NHWC[:, [0, -1]].any(), "and above and below"


def test_pictures_that_are_the_same_are_one_family(every_glyph: Glyphs) -> None:
    family: dict[bytes, str] = {}
    for emoji, rgba_HWC in zip(every_glyph.emoji, every_glyph.rgba_NHWC, strict=True):
        assert family.setdefault(rgba_HWC.tobytes(), emoji.family) == emoji.family, emoji.name
    assert len(family) < len(every_glyph), "Norway's flag is Svalbard's"
    assert len({e.family for e in every_glyph.emoji}) > 1800


def test_sequences_are_one_glyph_only_with_raqm(every_glyph: Glyphs) -> None:
    sequences = [e.text for e in every_glyph.emoji if ZWJ in e.text or e.group == "Flags"]
    assert len(sequences) > 1000  # each drawn above, which raises unless it is one glyph
    basic = ImageFont.truetype(glyphs.FONT, glyphs.STRIKE, layout_engine=ImageFont.Layout.BASIC)
    with pytest.raises(InputError, match="not one glyph"):
        glyphs.draw("\U0001f1ef\U0001f1f5", basic)  # the two letters of Japan's flag
    with pytest.raises(InputError, match="not one glyph"):
        glyphs.draw("\U0001f34e\U0001f34e", glyphs.open_font())


def test_composing_is_the_over_operator() -> None:
    rgba_HWC = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    alpha = rgba_HWC[..., 3:].astype(np.float64) / 255
    exact = alpha * rgba_HWC[..., :3] + (1 - alpha) * np.array(COLOURS["teal"])
    assert np.abs(glyphs.compose(rgba_HWC, COLOURS["teal"]) - exact).max() <= 0.5 + 255 * 4 * np.finfo(np.float32).eps


def test_missing_packages_and_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="fonts-noto-color-emoji"):
        glyphs.open_font(tmp_path / "absent.ttf")
    with pytest.raises(MissingDependencyError, match="unicode-data"):
        glyphs.read_emoji(tmp_path / "absent.txt", ())
    (tmp_path / "empty.txt").write_text("# group: none\n")
    with pytest.raises(DataError, match=r"empty\.txt lists no"):
        glyphs.read_emoji(tmp_path / "empty.txt", ())
    (tmp_path / "glyphs.npz").write_bytes(b"no npz")
    with pytest.raises(DataError, match=r"ldmkit_emoji\.data"):
        Glyphs.read(tmp_path / "glyphs.npz")


def test_a_pillow_without_raqm_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs.features, "check", lambda feature: False)
    with pytest.raises(MissingDependencyError, match="RAQM"):
        glyphs.open_font()


# --------------------------------------------------------------------------------------------------------------------- splits


def test_nothing_held_out_is_trained_on(every_glyph: Glyphs) -> None:
    rows = data.plan(every_glyph, white=3, coloured=4, seed=0)
    out_families = {e.family for e in every_glyph.emoji if data.glyph_held_out(e.family)}
    trained = [every_glyph.emoji[i] for i, _, _ in rows]
    assert not out_families & {e.family for e in trained}
    assert not [
        (e.name, colour) for e, (_, colour, _) in zip(trained, rows, strict=True) if data.pair_held_out(e.family, colour)
    ]
    held_out = sum(e.family in out_families for e in every_glyph.emoji) / len(every_glyph)
    pairs = np.mean([data.pair_held_out(e.family, c) for e in trained[::7] for c in COLOURS if c != "white"])
    assert 0.03 < held_out < 0.07
    assert 0.04 < pairs < 0.06
    assert len(rows) == 7 * (len(every_glyph) - sum(e.family in out_families for e in every_glyph.emoji))
    pictures = {every_glyph.rgba_NHWC[i].tobytes() for i, _, _ in rows}
    assert not [
        e.name
        for e, rgba_HWC in zip(every_glyph.emoji, every_glyph.rgba_NHWC, strict=True)
        if e.family in out_families and rgba_HWC.tobytes() in pictures
    ], "no held-out picture under another name"


def test_families_count_alike_and_nothing_held_out_is_trained_on(every_glyph: Glyphs) -> None:
    rows = data.plan_families(every_glyph, white=4, coloured=5, seed=1)
    assert rows == data.plan_families(every_glyph, white=4, coloured=5, seed=1)
    members = Counter(e.family for e in every_glyph.emoji if not data.glyph_held_out(e.family))
    shown = [(every_glyph.emoji[i], colour) for i, colour, _ in rows]
    assert Counter(e.family for e, _ in shown) == {family: 9 * min(data.TURNS, n) for family, n in members.items()}
    assert not [(e.name, colour) for e, colour in shown if data.pair_held_out(e.family, colour)]
    assert sum(colour == "white" for _, colour in shown) * 9 == 4 * len(shown)
    turns = Counter(e.name for e, _ in shown)
    for e, _ in shown:
        assert abs(turns[e.name] - 9 * min(data.TURNS, members[e.family]) / members[e.family]) < 1, "its glyphs take turns"
    toned = sum("skin tone" in e.name for e, _ in shown) / len(shown)
    assert toned < 0.3 < sum("skin tone" in e.name for e in every_glyph.emoji) / len(every_glyph)
    single = [(e.name, colour) for e, colour in shown if members[e.family] == 1 and colour != "white"]
    assert len(set(single)) == len(single), "each on backgrounds that differ"
    plain = sum(text == every_glyph.emoji[i].name.lower() for i, colour, text in rows if colour == "white")
    assert plain * 9 >= len(rows) * 2, "half of those on white"


def test_scenes_are_made_of_what_is_trained_and_keep_their_pairs_out(every_glyph: Glyphs) -> None:
    trained = [i for i in scenes.cast(every_glyph) if not data.glyph_held_out(every_glyph.emoji[i].family)]
    assert 40 < len(trained) < 60
    planned = scenes.plan_scenes(every_glyph, trained, 3000, seed=1)
    assert planned == scenes.plan_scenes(every_glyph, trained, 3000, seed=1)
    assert {i for scene in planned for i, _ in scene.parts} <= set(trained)
    families = [[every_glyph.emoji[i].family for i, _ in scene.parts] for scene in planned]
    assert not [pair for pair in families if len(pair) == 2 and data.scene_held_out(*pair)]
    share = np.mean([len(pair) == 2 for pair in families])
    assert abs(share - scenes.PAIR_SHARE) < 0.05
    pairs = [(a, b) for a in trained for b in trained if a < b]
    out = np.mean([data.scene_held_out(every_glyph.emoji[a].family, every_glyph.emoji[b].family) for a, b in pairs])
    assert 0.02 < out < 0.08
    assert data.scene_held_out("owl", "pizza") == data.scene_held_out("pizza", "owl")


def test_a_scene_shows_its_parts_at_half_their_size(every_glyph: Glyphs) -> None:
    i, j = scenes.cast(every_glyph)[:2]
    left, right = (every_glyph.on(COLOURS["teal"])[k].reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)) for k in (i, j))
    picture = scenes.paint(scenes.Scene(((i, "left"), (j, "right")), "teal", ""), every_glyph)
    assert np.abs(picture[scenes.window("left")] - left).max() <= 0.5
    assert np.abs(picture[16:48, 32:] - right).max() <= 0.5
    assert (picture[[*range(16), *range(48, 64)]] == COLOURS["teal"]).all()
    centre = scenes.paint(scenes.Scene(((i, "centre"),), "teal", ""), every_glyph)
    assert (centre[16:48, 16:48] == picture[scenes.window("left")]).all()
    large = scenes.paint(scenes.Scene(((j, "large"),), "teal", ""), every_glyph)
    assert (large == glyphs.compose(every_glyph.rgba_NHWC[j], COLOURS["teal"])).all()


def test_captions_of_scenes_fit_the_text_encoder(every_glyph: Glyphs, tokenizer: BertWordPieceTokenizer) -> None:
    planned = scenes.plan_scenes(every_glyph, scenes.cast(every_glyph), 3000, seed=1)
    encoded = tokenizer.encode_batch([scene.text for scene in planned])
    assert max(len(e.ids) for e in encoded) <= 32, "the recipe's max_length"
    assert not [e.tokens for e in encoded if "[UNK]" in e.tokens]
    assert not [s for s in planned if s.colour != "white" and f"{s.colour} background" not in s.text]


def test_white_is_never_held_out_and_backgrounds_differ() -> None:
    emoji = [_emoji(f"thing {i}") for i in range(200)]
    assert not any(data.pair_held_out(e.family, "white") for e in emoji)
    for e in emoji:
        chosen = data.backgrounds(e, 11, seed=0)
        assert len(set(chosen)) == len(chosen)
        assert set(chosen) == {c for c in COLOURS if c != "white" and not data.pair_held_out(e.family, c)}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, every_glyph: Glyphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", lambda progress: every_glyph)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        counts = data.make(tmp_path / name, seed=seed, white=1, coloured=1, families=True, scenes=30, limit=400)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["captions.txt", "glyphs.npz", "splits.json", "train.npz", "vocab.txt"]
    read = {name: [(tmp_path / name / file).read_bytes() for file in files] for name in "abc"}
    assert read["a"] == read["b"]
    assert read["a"][0] != read["c"][0], "another seed makes other captions"
    splits = [json.loads((tmp_path / name / "splits.json").read_text()) for name in "ac"]
    assert splits[0]["held_out_glyphs"] == splits[1]["held_out_glyphs"], "and holds the same out"
    with np.load(tmp_path / "a" / "train.npz", allow_pickle=False) as train:
        assert train["x"].shape == (counts["pictures"], 64, 64, 3)
        assert train["x"].dtype == np.uint8
        assert train["text"].tolist() == (tmp_path / "a" / "captions.txt").read_text().splitlines()
    stored = Glyphs.read(tmp_path / "a" / "glyphs.npz")
    assert len(stored) == counts["glyphs"] == 400
    assert set(stored.emoji) < set(every_glyph.emoji)


@pytest.mark.parametrize("counts", [{"white": 0}, {"coloured": 12}, {"coloured": -1}, {"scenes": -1}, {"limit": 0}])
def test_impossible_counts_are_refused(tmp_path: Path, counts: dict[str, int]) -> None:
    with pytest.raises(InputError, match="white="):
        data.make(tmp_path, **counts)


# ------------------------------------------------------------------------------------------------------- captions, vocabulary


def test_captions_name_the_background_and_fit_the_text_encoder(every_glyph: Glyphs, tokenizer: BertWordPieceTokenizer) -> None:
    rows = data.plan(every_glyph, white=3, coloured=4, seed=0)
    rows += data.plan_families(every_glyph, white=7, coloured=7, seed=1)
    assert not [text for _, colour, text in rows if colour != "white" and colour not in text]
    plain = {text for _, colour, text in rows if colour == "white"}
    assert {e.name.lower() for e in every_glyph.emoji if not data.glyph_held_out(e.family)} <= plain
    encoded = tokenizer.encode_batch([text for _, _, text in rows])
    assert max(len(e.ids) for e in encoded) <= 32, "the recipe's max_length"
    assert not [e.tokens for e in encoded if "[UNK]" in e.tokens]


def test_the_committed_vocabulary_is_the_one_made(every_glyph: Glyphs) -> None:
    assert VOCAB.read_text(encoding="utf-8").splitlines() == vocabulary(every_glyph.emoji)


def test_the_vocabulary_is_small_and_begins_as_berts_does() -> None:
    pieces = VOCAB.read_text(encoding="utf-8").splitlines()
    assert len(pieces) <= 4000
    assert len(set(pieces)) == len(pieces)
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert set(COLOURS) <= set(pieces)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60))
def test_any_ascii_prompt_is_spelt(tokenizer: BertWordPieceTokenizer, prompt: str) -> None:
    assert "[UNK]" not in tokenizer.encode(prompt).tokens


@given(st.integers(0, 2**31), st.integers(0, 9), st.sampled_from(sorted(COLOURS)))
def test_a_caption_is_a_function_of_its_key(seed: int, number: int, colour: str) -> None:
    emoji = _emoji("flag: Nowhere")
    text = captions.caption(emoji, colour, number, seed)
    assert text == captions.caption(emoji, colour, number, seed)
    assert "nowhere" in text
    assert text == text.lower()
    assert colour == "white" or colour in text


def _emoji(name: str) -> Emoji:
    return Emoji(text="?", name=name, group="g", subgroup="s", family=glyphs.family_name(name), keywords=("place", "land"))
