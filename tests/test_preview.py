"""Pictures as they emerge: the callback, small decoders, and `ldmkit generate --preview`."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from ldmkit import CheckpointError, ConfigError, InputError, Pipeline, Preview, build, load_decoder, save_part
from ldmkit.cli import main
from ldmkit.images import from_pixels
from tests.conditions import randomise, tiny_pipeline
from tests.network_peers import randomise as randomise_network

TINY = {"channels": 8, "encoder_blocks": [1, 1], "decoder_blocks": [1, 1]}


@pytest.fixture
def pipe(tmp_path: Path) -> Pipeline:
    return tiny_pipeline(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("own", [True, False], ids=["its own decoder", "a small one"])
def test_what_is_shown_is_the_decoded_estimate(pipe: Pipeline, own: bool) -> None:
    decoder = None if own else build("autoencoder", "taesd", **TINY)
    if decoder is not None:
        randomise(decoder)
    shown: list[tuple[list[Image.Image], int]] = []
    estimates: list[torch.Tensor] = []
    preview = Preview(lambda images, steps: shown.append((list(images), steps)), decoder=decoder, every=3)

    def callback(pipe, step, t, now):
        estimates.append(now["denoised"])
        return preview(pipe, step, t, now)

    prompts = ["a pear", "a red apple"]
    final = pipe(prompts, seed=1, output_type="latent", callback_on_step_end=callback).images
    assert torch.equal(final, pipe(prompts, seed=1, output_type="latent").images)
    assert [steps for _, steps in shown] == [3, 4]  # each third, and the last, which is finished
    for (images, _), latents in zip(shown, (estimates[2], final), strict=True):
        expected = from_pixels((decoder or pipe.autoencoder).decode(latents), "pil")
        assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]


def test_a_file_is_written_anew_each_time(pipe: Pipeline, tmp_path: Path) -> None:
    sizes, seen = [], set()
    preview = Preview(tmp_path / "now.png")

    def callback(pipe, step, t, now):
        preview(pipe, step, t, now)
        with Image.open(tmp_path / "now.png") as image:
            sizes.append(image.size)
            seen.add(image.tobytes())

    pipe("a pear", callback_on_step_end=callback)
    assert sizes == [(32, 32)] * 4
    assert len(seen) == 4
    pipe(["a pear", "a red apple"], callback_on_step_end=preview)
    assert Image.open(tmp_path / "now.png").width > 2 * 32  # all of them in one sheet
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".png", ".txt"]


def test_decoders_from_folders(tmp_path: Path, shared: Path) -> None:
    z_BCHW = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    published = load_decoder(shared / "data/taesd", dtype=torch.float64)
    assert load_decoder(shared / "data/taesd", name="taesdxl").decode(z_BCHW).shape == (1, 3, 32, 32)
    assert next(published.parameters()).dtype == torch.float64
    again = load_decoder(save_part(published, tmp_path / "part"), dtype=torch.float64)
    peer = diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                                     num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()  # fmt: skip
    randomise_network(peer)
    peer.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(again.decode(z_BCHW), published.decode(z_BCHW))
        theirs = peer.double().decode(z_BCHW.double()).sample
        assert (load_decoder(tmp_path / "theirs", dtype=torch.float64).decode(z_BCHW.double()) - theirs).abs().max() < 1e-12
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither config.json .* nor TAESD's taesd_encoder.safetensors"):
        load_decoder(tmp_path / "empty")


def test_what_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="every = 0"):
        Preview("now.png", every=0)
    with pytest.raises(InputError, match=r"now.jpg: previews are written as PNG"):
        Preview("now.jpg")
    with pytest.raises(ConfigError, match="takes latents of 3 channels, and the pipeline's have 4"):
        Preview("now.png", decoder=build("autoencoder", "taesd", **TINY, latent_channels=3)).check(pipe)


def test_from_the_command_line(pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder = build("autoencoder", "taesd", **TINY)
    randomise(decoder)
    model, folder = pipe.save_pretrained(tmp_path / "model"), save_part(decoder, tmp_path / "taesd")
    wrong = save_part(build("autoencoder", "taesd", **TINY, latent_channels=3), tmp_path / "wrong")
    common = ["generate", "a pear", "--model", str(model), "--seed", "1", "--no-progress", "-o", str(tmp_path / "out")]
    now = tmp_path / "now.png"
    assert main([*common, "--preview", str(now)]) == 0
    assert Image.open(now).tobytes() == Image.open(tmp_path / "out/a-pear-1.png").tobytes()  # the last is the picture itself
    own = Image.open(now).tobytes()
    assert main([*common, "--preview", str(now), "--taesd", str(folder)]) == 0
    assert Image.open(now).tobytes() != own
    assert Image.open(tmp_path / "out/a-pear-2.png").tobytes() == own
    for options, message in (
        (["--preview", "now.jpg"], "--preview now.jpg: pictures are written as PNG"),
        (["--taesd", str(folder)], "is the decoder of --preview, which was not given"),
        (["--preview", str(now), "--taesd", str(wrong)], "takes latents of 3 channels"),
    ):
        assert main([*common, *options]) == 2
        assert message in capsys.readouterr().err
