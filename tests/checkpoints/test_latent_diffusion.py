"""The originals of latent diffusion, as folders of diffusers and as CompVis' single files: run beside diffusers, and back."""

import copy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldmkit import Pipeline, build
from ldmkit.checkpoints.compvis import ldm_bert_map, unet_map, vae_map
from ldmkit.checkpoints.container import SafetensorsFile
from ldmkit.checkpoints.keymap import KeyMap, Rule
from ldmkit.checkpoints.recognise import recognise
from ldmkit.cli import main
from ldmkit.errors import CheckpointError, ConfigError, InputError
from ldmkit.testing.accuracy import assert_as_accurate
from ldmkit_unet.presets import PRESETS as UNET_PRESETS
from ldmkit_vae.presets import PRESETS, VQ_PRESETS
from tests.ldm_peers import (
    BERT,
    CHURCHES,
    F8,
    PLAIN,
    PROMPT,
    SCHEDULER,
    VQ,
    drawn,
    exact,
    named,
    quiet,
    super_resolution,
    text_to_image,
    unconditional,
    write_bert_tokenizer,
)
from tests.network_peers import UNETS, randomise
from tests.peers import in_float64

TEXT = {"prompt": [PROMPT] * 2, "guidance_scale": 3.0, "height": 64, "width": 64}
UNET, VAE, BERT_PLACE = "model.diffusion_model", "first_stage_model", "cond_stage_model.transformer"


def accounted(pipe: Pipeline, file: Path) -> bool:
    """Whether every key of a file is a weight of a part, or left out for a reason."""
    found = {key for each in pipe.accounting.values() for key in (*each.mapped.values(), *each.ignored)}
    return found == set(SafetensorsFile(file).entries)


def same_in_diffusers(folder: Path, peer: Any, theirs: torch.Tensor, oracle: torch.Tensor, **arguments: Any) -> None:
    """What we wrote is for diffusers the pipeline that it was: classes, every weight, and what it draws."""
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(folder))
    assert type(again) is type(peer)
    for name in {"unet", "vqvae", "bert"} & peer.components.keys():
        before, after = (getattr(pipe, name).state_dict() for pipe in (peer, again))
        assert type(getattr(again, name)) is type(getattr(peer, name))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith("to_logits."))
    assert_as_accurate(drawn(again, **arguments), theirs, oracle)


# -------------------------------------------------------------------------------------------------------------- text to image


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return text_to_image(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def texts_drawn(texts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What diffusers draws, in float32 and in float64."""
    return drawn(texts, **TEXT), exact(texts, **TEXT)


def test_text_to_image_folder(texts: Any, texts_drawn: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts.save_pretrained(tmp_path / "theirs")
    pipe = Pipeline.from_pretrained(tmp_path / "theirs")
    assert_as_accurate(drawn(pipe, **TEXT), *texts_drawn)
    assert (pipe.defaults.height, pipe.defaults.guidance_scale) == (64, 1.0)
    assert set(pipe.accounting["conditioner"].ignored) == {"to_logits.weight", "to_logits.bias"}
    written = pipe.save_pretrained(tmp_path / "ours", format="diffusers")
    same_in_diffusers(written, texts, *texts_drawn, **TEXT)
    own = pipe.save_pretrained(tmp_path / "own")
    assert torch.equal(drawn(Pipeline.from_pretrained(own), **TEXT), drawn(pipe, **TEXT))
    assert main(["inspect", str(tmp_path / "theirs")]) == 0
    shown = capsys.readouterr().out
    assert [word for word in ("LDMTextToImagePipeline", "LDMBertModel", "conditioner: to_logits") if word not in shown] == []


def test_text_to_image_file(texts: Any, texts_drawn: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = named(
        (unet_map(levels=2, layers_per_block=2, attention=(True, False)).prefixed(UNET), texts.unet),
        (vae_map(levels=4, layers_per_block=2).prefixed(VAE), texts.vqvae),
        (ldm_bert_map(layers=2).prefixed(BERT_PLACE), texts.bert),
    )
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    config = {"unet": {"norm_num_groups": 8, "attention_head_dim": 2}, "vae": {"norm_num_groups": 4}}
    config["bert"] = {key: BERT[key] for key in ("encoder_attention_heads", "head_dim")}
    with pytest.raises(CheckpointError, match=r"tokenizer=FOLDER with vocab\.txt or tokenizer\.json; .*bert-base-uncased in"):
        Pipeline.from_single_file(file, config)
    write_bert_tokenizer(tmp_path / "tokenizer")
    pipe = Pipeline.from_single_file(file, config)
    assert_as_accurate(drawn(pipe, **TEXT), *texts_drawn)
    assert accounted(pipe, file)
    assert pipe.autoencoder.config.scaling_factor == 0.18215
    assert pipe.defaults.height == 256
    assert main(["inspect", str(file)]) == 0
    shown = capsys.readouterr().out
    assert [word for word in ("latent diffusion, text to image", "LDMBertModel") if word not in shown] == []
    same_in_diffusers(pipe.save_pretrained(tmp_path / "ours", format="diffusers"), texts, *texts_drawn, **TEXT)


def test_a_codebook_is_not_for_stable_diffusion(tmp_path: Path) -> None:
    from tests.checkpoint_peers import stable_diffusion

    stable_diffusion(tmp_path / "tokenizer").save_pretrained(tmp_path / "sd")
    vq = {"name": "vq", "block_out_channels": [8, 16], "norm_num_groups": 4, "latent_channels": 4}
    pipe = Pipeline.from_pretrained(tmp_path / "sd", autoencoder=vq)
    with pytest.raises(InputError, match="StableDiffusionPipeline takes no VQModel"):
        pipe.save_pretrained(tmp_path / "out", format="diffusers")


# -------------------------------------------------------------------------------------------------------------- unconditional


def faces() -> Any:
    return unconditional(PLAIN, diffusers.VQModel(**VQ))


def churches() -> Any:
    return unconditional(CHURCHES, diffusers.AutoencoderKL(**{**F8, "scaling_factor": 0.3}))


KEYS = {
    "faces": (
        unet_map(levels=2, layers_per_block=2, attention=(False, True), plain_head_channels=[32, 32]),
        vae_map(levels=3, layers_per_block=2),
    ),
    "churches": (
        unet_map(levels=2, layers_per_block=2, attention=(True, False), plain_head_channels=[4, 4], resnet_resampling=True),
        vae_map(levels=4, layers_per_block=2),
    ),
}
PEERS = {"faces": faces, "churches": churches}
FAMILY = ("latent diffusion, unconditional", "UNet2DModel")
TOLD = {"unet": {"norm_num_groups": 8}, "vae": {"norm_num_groups": 4}}
SHAPES = {"faces": (2, 3, 8, 8), "churches": (2, 4, 8, 8)}


@pytest.mark.parametrize("name", PEERS)
def test_unconditional(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer, shape = PEERS[name](), SHAPES[name]
    theirs, oracle = drawn(peer, shape=shape, batch_size=2), exact(peer, shape=shape, batch_size=2)
    peer.save_pretrained(tmp_path / "theirs")
    pipe = Pipeline.from_pretrained(tmp_path / "theirs")
    assert_as_accurate(drawn(pipe, shape=shape), theirs, oracle)
    assert pipe.defaults.height == 8 * pipe.autoencoder.downscale
    assert pipe.autoencoder.config.scaling_factor == peer.vqvae.config.scaling_factor
    written = pipe.save_pretrained(tmp_path / "ours", format="diffusers")
    same_in_diffusers(written, peer, theirs, oracle, shape=shape, batch_size=2)

    unet_keys, vae_keys = KEYS[name]
    tensors = named((unet_keys.prefixed(UNET), peer.unet), (vae_keys.prefixed(VAE), peer.vqvae))
    tensors |= {"betas": torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64).square().float()}
    tensors |= {"scale_factor": torch.tensor(0.3)} if name == "churches" else {}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    config = {**TOLD, "unet": {**TOLD["unet"], "attention_head_dim": 4}} if name == "churches" else TOLD
    single = Pipeline.from_single_file(file, config)
    found = single.autoencoder.config
    assert found.scaling_factor == float(torch.tensor(peer.vqvae.config.scaling_factor))
    assert found.shape == pipe.autoencoder.config.shape
    size = 8 * single.autoencoder.downscale
    assert_as_accurate(drawn(single, shape=shape, height=size, width=size), theirs, oracle)
    assert accounted(single, file)
    assert main(["inspect", str(file)]) == main(["inspect", str(tmp_path / "theirs")]) == 0
    shown = capsys.readouterr().out
    assert [word for word in (*FAMILY, type(peer.vqvae).__name__, "LDMPipeline") if word not in shown] == []


def test_heads_that_are_told_sort_the_packed_rows(tmp_path: Path) -> None:
    """Queries, keys and values lie head by head, so another number of heads means another order of rows."""
    peer = faces()
    save_file(named((KEYS["faces"][0].prefixed(UNET), peer.unet), (KEYS["faces"][1].prefixed(VAE), peer.vqvae)), tmp_path / "x")
    schedule = {"beta_start": 0.0015, "beta_end": 0.0195}
    sixteen = {**TOLD, "unet": {**TOLD["unet"], "attention_head_dim": 16}}
    pipe = Pipeline.from_single_file(tmp_path / "x", sixteen, schedule=schedule)
    assert pipe.denoiser.config.num_attention_heads == (2, 4)
    packed = peer.unet.mid_block.attentions[0]
    rows = torch.cat([getattr(packed, f"to_{name}").weight.unflatten(0, (2, 32)) for name in "qkv"], dim=1).flatten(0, 1)
    blocks = rows.unflatten(0, (4, 3, 16))
    assert torch.equal(pipe.denoiser.mid_block.attentions[0].to_k.weight, blocks[:, 1].flatten(0, 1))
    for wrong in ([16], True, 0, "many"):
        with pytest.raises(ConfigError, match=r"attention_head_dim = .* must be the channels of a head"):
            Pipeline.from_single_file(tmp_path / "x", {**TOLD, "unet": {"attention_head_dim": wrong}}, schedule=schedule)


# ----------------------------------------------------------------------------------------------------------- class-conditional


def test_class_conditional(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """VQ-f4 and one token per class; diffusers has no pipeline for it, but a U-Net and a scheduler."""
    values = {**UNETS["sd1"], "in_channels": 3, "out_channels": 3, "cross_attention_dim": 512, "attention_head_dim": 1}
    unet, autoencoder = diffusers.UNet2DConditionModel(**values).eval(), diffusers.VQModel(**VQ).eval()
    randomise(unet, 1)
    randomise(autoencoder, 2)
    table = torch.nn.Embedding(11, 512)
    randomise(table, 4)
    tensors = named(
        (unet_map(levels=2, layers_per_block=2, attention=(True, False)).prefixed(UNET), unet),
        (vae_map(levels=3, layers_per_block=2).prefixed(VAE), autoencoder),
        (KeyMap([Rule("cond_stage_model.embedding", "")]), table),
    )
    file = tmp_path / "cin.safetensors"
    save_file(tensors, file)
    pipe = Pipeline.from_single_file(file, TOLD, schedule={"beta_start": 0.0015, "beta_end": 0.0195})
    assert accounted(pipe, file)

    def theirs(wide: bool) -> torch.Tensor:
        """DDIM with classifier-free guidance towards classes 3 and 7, written out; class 10 is the null class."""
        dtype = torch.float64 if wide else torch.float32
        network, tokens = copy.deepcopy(unet).to(dtype), table.weight.to(dtype)[:, None]
        scheduler = diffusers.DDIMScheduler(beta_start=0.0015, beta_end=0.0195, **SCHEDULER)
        scheduler.set_timesteps(4)
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
        for t in scheduler.timesteps:
            away, towards = (network(x, t, tokens[classes]).sample for classes in ([10, 10], [3, 7]))
            x = scheduler.step(away + 3.0 * (towards - away), t, x).prev_sample
        return x

    with torch.no_grad():
        mine, single = (
            drawn(pipe, shape=(2, 3, 8, 8), class_labels=[3, 7], guidance_scale=3.0, height=32, width=32),
            theirs(False),
        )
        with in_float64():
            oracle = theirs(True)
    assert_as_accurate(mine, single, oracle)
    assert main(["inspect", str(file)]) == 0
    shown = capsys.readouterr().out
    assert [word for word in ("latent diffusion, class-conditional", "ClassEmbedder", "VQModel") if word not in shown] == []


# ------------------------------------------------------------------------------------------------------------ super-resolution


SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
"""Of a size that diffusers does not change."""
LARGE = (1, 3, 32, 32)


def test_super_resolution(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer = super_resolution()
    theirs, oracle = (run(peer, shape=LARGE, image=SMALL) for run in (drawn, exact))
    peer.save_pretrained(tmp_path / "theirs")
    pipe = Pipeline.from_pretrained(tmp_path / "theirs")
    assert_as_accurate(drawn(pipe, shape=LARGE, image=SMALL), theirs, oracle)
    assert pipe.defaults.num_inference_steps == 100
    written = pipe.save_pretrained(tmp_path / "ours", format="diffusers")
    same_in_diffusers(written, peer, theirs, oracle, shape=LARGE, image=SMALL)
    own = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "own"))
    assert_as_accurate(drawn(own, shape=LARGE, image=SMALL), theirs, oracle)
    assert own(image=SMALL, num_inference_steps=1, progress=False).images[0].size == (128, 128)

    unet_keys, vae_keys = KEYS["faces"]
    tensors = named((unet_keys.prefixed(UNET), peer.unet), (vae_keys.prefixed(VAE), peer.vqvae))
    tensors |= {"betas": torch.linspace(0.0015**0.5, 0.0155**0.5, 1000, dtype=torch.float64).square().float()}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    single = Pipeline.from_single_file(file, TOLD)
    assert_as_accurate(drawn(single, shape=LARGE, image=SMALL), theirs, oracle)
    assert single.defaults.num_inference_steps == 100
    assert accounted(single, file)
    assert main(["inspect", str(file)]) == main(["inspect", str(tmp_path / "theirs")]) == 0
    shown = capsys.readouterr().out
    assert [word for word in ("latent diffusion, super-resolution", "LDMSuperResolutionPipeline") if word not in shown] == []


def test_super_resolution_that_cannot_be(tmp_path: Path) -> None:
    super_resolution().save_pretrained(tmp_path / "theirs")
    pipe = Pipeline.from_pretrained(tmp_path / "theirs")
    with pytest.raises(InputError, match="this pipeline upscales pictures: give image="):
        pipe()
    with pytest.raises(InputError, match="this upscaler takes the picture as it is"):
        pipe(image=SMALL, noise_level=3)
    pipe.autoencoder.rescaled(scaling_factor=0.5, shift_factor=0.0)
    with pytest.raises(InputError, match=r"decodes latents unscaled, and scaling_factor = 0\.5"):
        pipe.save_pretrained(tmp_path / "x", format="diffusers")
    plain = Pipeline.from_pretrained(tmp_path / "theirs", upscaling=None)
    with pytest.raises(InputError, match=r"no pipeline for the encoders \[\], 3 channels beside the latents; save"):
        plain.save_pretrained(tmp_path / "x", format="diffusers")


# ------------------------------------------------------------------------------------------------------------------ full sizes

PUBLISHED = {
    "ldm-celebahq": ("ldm-vq-f4", 274e6),
    "ldm-churches": ("ldm-kl-f8", 294e6),
    "ldm-imagenet-class": ("ldm-vq-f4", 400e6),
    "ldm-text2img": ("ldm-kl-f8", 872e6),
    "ldm-super-resolution": ("ldm-vq-f4", 113e6),
}
"""The originals' autoencoders, and the size of their U-Nets."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_models_are_recognised(name: str) -> None:
    """From names and shapes alone: the configs they were published with, and every key accounted for, both ways."""
    vae_name, size = PUBLISHED[name]
    values = {**PRESETS, **VQ_PRESETS}[vae_name]
    with torch.device("meta"):
        unet = build("denoiser", "unet", **UNET_PRESETS[name])
        vae = build("autoencoder", "vq" if "vq" in vae_name else "kl", **values)
    assert size <= sum(p.numel() for p in unet.parameters()) < size + 1e6
    config, levels = unet.config, len(unet.config.block_out_channels)
    heads = [w // n for w, n in zip(config.block_out_channels, config.per_level(config.num_attention_heads), strict=True)]
    keys = unet_map(
        levels=levels,
        layers_per_block=config.layers_per_block,
        attention=tuple(depth > 0 for depth in config.transformer_layers_per_block),
        plain_head_channels=heads if config.attention_block == "plain" else None,
        resnet_resampling=config.resnet_resampling,
    )
    vae_keys = vae_map(levels=len(vae.config.block_out_channels), layers_per_block=2)
    theirs = keys.prefixed(UNET).restore(unet.state_dict()) | vae_keys.prefixed(VAE).restore(vae.state_dict())
    found = {each.name: each for each in recognise({key: tuple(value.shape) for key, value in theirs.items()})}
    for component, part in (("unet", unet), ("vae", vae)):
        each = found[component]
        told = {"_class_name": each.class_name, **each.config}
        read = type(part).Config.parse(type(part).from_diffusers({component: told}, {}).config)
        if component == "unet":
            assert read.per_level(read.num_attention_heads) == config.per_level(config.num_attention_heads)
            read = read.replace(num_attention_heads=part.config.to_dict()["num_attention_heads"])
        else:
            assert read.shape == part.config.shape
            width = {"vq_embed_dim": 3} if "vq" in vae_name else {}
            same = {"scaling_factor": 1.0, "attention_levels": [], "force_upcast": False, **width}
            read, part.config = read.replace(**same), part.config.replace(**same)
        assert read == part.config
        ours = {name for key in theirs for name, _ in each.keymap.targets(key)}
        assert ours == set(part.state_dict())
