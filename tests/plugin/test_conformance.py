"""The built-in parts pass the suites that a stranger's parts are held to."""

import json

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from ldmkit import available
from ldmkit.testing import conformance

NOISELESS = {
    "euler-ancestral": {"eta": 0.0},
    "dpm-2-ancestral": {"eta": 0.0},
    "dpm++-2s-ancestral": {"eta": 0.0},
    "dpm++-sde": {"eta": 0.0},
    "dpm++-2m-sde": {"eta": 0.0},
    "dpm++-3m-sde": {"eta": 0.0},
    "restart": {"intervals": []},
}
CONSISTENCY = ("consistency", "lcm")


OTHER_RUNS = {
    "ddim-inverse": "it leads an image up to its noise, where the suite's runs come down from noise",
    "dpm-adaptive": "it finds its own levels, so that there are no numbers of steps to compare",
}
"""Samplers whose runs the suite's properties do not speak of; tests of their own hold them."""


@pytest.mark.parametrize("name", [name for name in available("sampler") if name not in OTHER_RUNS])
def test_samplers(name):
    subject = conformance.subject("sampler", name, noiseless=NOISELESS.get(name, {}), consistency=name in CONSISTENCY)
    report = conformance.check(subject, examples=3)
    assert report.passed, report.table()
    absent = {"declared order"} if subject.part.facts.order is None else set()
    assert {row.name for row in report if row.verdict == "not applicable"} == absent


UNET = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 0],
    "num_attention_heads": 2,
    "cross_attention_dim": 8,
    "norm_num_groups": 4,
}
UNETS = [
    UNET,
    {**UNET, "cross_attention_dim": None, "num_class_embeds": 3, "vector_dim": 6},
    {**UNET, "in_channels": 7, "spatial_channels": 3, "cache_context": False, "use_linear_projection": True},
]


def channels_of(config):
    return {
        "tokens_BLC": config.cross_attention_dim,
        "vector_BC": config.vector_dim,
        "labels_B": config.num_class_embeds,
        "spatial_BCHW": config.spatial_channels,
    }


KL = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
AUTOENCODERS = {
    "kl": [KL, {**KL, "attention_levels": [False, True], "use_quant_conv": False, "scaling_factor": [0.5, 1.0, 1.5, 2.0]}],
    "vq": [{"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "num_vq_embeddings": 16}],
    "taesd": [{"channels": 8}],
    "identity": [{}],
}


def passes(subject, absent=(), **options):
    report = conformance.check(subject, examples=2, **options)
    assert report.passed, report.table()
    assert {row.name for row in report if row.verdict == "not applicable"} == set(absent)


def test_the_denoiser():
    passes(conformance.subject("denoiser", "unet", configs=UNETS, condition=channels_of))


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders(name):
    passes(
        conformance.subject("autoencoder", name, configs=AUTOENCODERS[name]),
        {"scale and shift"} if name in ("identity", "taesd") else set(),
    )


TEXT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
PROMPTS = ["a red apple", "the cats", "", "apple on the red apple"]


def test_bert(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple", "on", "the", "cat", "##s"]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    config = {**TEXT, "vocab": str(tmp_path / "vocab.txt"), "max_length": 8}
    passes(conformance.subject("conditioner", "bert", configs=[config], inputs=PROMPTS))


def test_clip(tmp_path):
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    config = {**TEXT, "vocab": str(tmp_path / "vocab.json"), "merges": str(tmp_path / "merges.txt")}
    pooled = {**config, "layer": "penultimate", "pooled": True, "projection_dim": 6}
    passes(conformance.subject("conditioner", "clip-text", configs=[config, pooled], inputs=PROMPTS))


def test_class_labels():
    configs = [{"num_classes": 5, "hidden_size": 4}, {"num_classes": 5, "mode": "labels"}]
    passes(conformance.subject("conditioner", "class-label", configs=configs, inputs=[0, 3, 1]))


MADE_OF_OTHERS = {"sdxl-text": "two clip-text conditioners side by side, each held by the suite"}


def test_no_builtin_part_is_left_out():
    assert {kind: set(available(kind)) for kind in ("denoiser", "autoencoder", "conditioner")} == {
        "denoiser": {"unet"},
        "autoencoder": set(AUTOENCODERS),
        "conditioner": {"bert", "clip-text", "class-label", *MADE_OF_OTHERS},
    }
