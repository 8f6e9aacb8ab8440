"""What loading full-size single files costs in time and memory, beside diffusers.

Files of Stable Diffusion 1.5 (2 GB) and XL's base (7 GB) with random fp16 weights, under CompVis' and Stability's names, are
written to a temporary folder. Fresh processes load them in turn, ldmkit's `Pipeline.from_single_file` and the same of
diffusers' pipelines, in fp16, and 1.5 in fp32 as well; imports are not timed. Peak memory is that of anonymous pages (RssAnon,
which leaves out the mapped file) and of all resident pages, beyond what the imports took. Every key of the file is accounted
for, or the run fails.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import ROOT, Spread, ratio
from ldmkit import build
from ldmkit.checkpoints.compvis import clip_map, open_clip_map, unet_map, vae_map
from ldmkit.checkpoints.keymap import KeyMap
from ldmkit.checkpoints.skeletons import skeleton
from ldmkit.plugin.registry import part_class
from ldmkit_text.clip import PRESETS
from ldmkit_unet.presets import PRESETS as UNETS

PEER = "diffusers"
CLIP = {"vocab_size": 49408}
SD, XL = "sd15", "sdxl"
CASES = ((SD, "float16"), (SD, "float32"), (XL, "float16"))
TIMING = {"rounds": 5, "least_seconds": 0.0}
"""Of a full run: a load takes seconds."""
TILE = 2**24
"""So many random numbers are drawn, and repeated: drawing all of XL's takes longer than all loads together."""

CHILD = """
import gc, json, sys, threading, time
from pathlib import Path
import torch
name, file, folder, dtype = sys.argv[1:]
dtype = getattr(torch, dtype)

def memory():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024, int(lines["VmRSS"].split()[0]) * 1024

if name == "ldmkit":
    from ldmkit import Pipeline
    import ldmkit_text.sdxl, ldmkit_unet.unet, ldmkit_vae.autoencoder
    load = lambda: Pipeline.from_single_file(file, config=folder, tokenizer=folder + "/tokenizer", dtype=dtype)
else:
    import diffusers, diffusers.loaders.single_file, transformers.models.clip.modeling_clip
    P = getattr(diffusers, json.loads(Path(folder, "model_index.json").read_text())["_class_name"])
    load = lambda: P.from_single_file(file, config=folder, torch_dtype=dtype, local_files_only=True)
gc.collect()
start, peak, done = memory(), [0, 0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[:] = map(max, peak, memory())

thread = threading.Thread(target=watch)
thread.start()
began = time.perf_counter()
pipe = load()
seconds = time.perf_counter() - began
done.set()
thread.join()
peak[:] = map(max, peak, memory())
keys = {key for a in getattr(pipe, "accounting", {}).values() for key in (*a.mapped.values(), *a.ignored)}
took = {"seconds": seconds, "anonymous": peak[0] - start[0], "resident": peak[1] - start[1], "keys": len(keys)}
print("RESULT", json.dumps(took))
"""


@dataclass(frozen=True)
class Model:
    """A file: the parts below each prefix (kind, name, config, names there), and what its configs are made from.

    Attributes:
        conditioner: name and config of the one that all text encoders are parts of.
        class_name: of diffusers' pipeline.
    """

    parts: Mapping[str, tuple[str, str, dict[str, Any], KeyMap]]
    conditioner: tuple[str, dict[str, Any]]
    class_name: str

    def config(self, kind: str) -> dict[str, Any]:
        """Of the part of a kind other than the conditioner."""
        return next(config for found, _, config, _ in self.parts.values() if found == kind)


def model_of(name: str, narrow: bool, vocabulary: Path) -> Model:
    """Stable Diffusion 1.5 (narrow in quick runs) or XL's base."""
    paths = {"vocab": str(vocabulary / "vocab.json"), "merges": str(vocabulary / "merges.txt")}
    vae = ("autoencoder", "kl", {}, vae_map(levels=4, layers_per_block=2))
    if name == XL:
        first = {**CLIP, "layer": "penultimate", "final_layer_norm": False}
        second = {**PRESETS["open-clip-bigg"], **CLIP}
        places = {
            "conditioner.embedders.0.transformer": ("conditioner", "clip-text", {**CLIP, **paths}, clip_map()),
            "conditioner.embedders.1.model": ("conditioner", "clip-text", {**second, **paths}, open_clip_map(layers=32)),
        }
        names = unet_map(levels=3, layers_per_block=2, attention=(False, True, True))
        unet = ("denoiser", "unet", dict(UNETS["sdxl"]), names)
        return Model(
            {"model.diffusion_model": unet, "first_stage_model": vae, **places},
            ("sdxl-text", {"first": first, "second": second, **paths}),
            "StableDiffusionXLPipeline",
        )
    own = {"block_out_channels": [64, 128, 128, 128]} if narrow else {}
    text = {**CLIP, **paths}
    if narrow:
        text |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = unet_map(levels=4, layers_per_block=2, attention=(True,) * 3 + (False,))
    return Model(
        {
            "model.diffusion_model": ("denoiser", "unet", {**own, **({"cross_attention_dim": 128} if narrow else {})}, names),
            "first_stage_model": ("autoencoder", "kl", own, vae[3]),
            "cond_stage_model.transformer": ("conditioner", "clip-text", text, clip_map()),
        },
        ("clip-text", text),
        "StableDiffusionPipeline",
    )


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the file."""
    result = {}
    for prefix, (kind, name, config, keymap) in model.parts.items():
        cls = part_class(kind, name)
        state = skeleton(cls, cls.Config.parse(config)).state_dict()
        on_meta = {key: torch.empty(value.shape, device="meta") for key, value in state.items()}
        result |= {key: tuple(value.shape) for key, value in keymap.prefixed(prefix).restore(on_meta).items()}
    return result


def write_file(path: Path, contents: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of random fp16 weights."""
    header, end = {}, 0
    for key, shape in contents.items():
        size = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    tile = (torch.randn(TILE, generator=torch.Generator().manual_seed(0)) / 50).half().numpy().tobytes()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for begin in range(0, end, len(tile)):
            file.write(tile[: end - begin])


def write_vocabulary(folder: Path) -> Path:
    """CLIP's bytes and special tokens, without merges."""
    folder.mkdir(parents=True)
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}')
    return folder


def write_configs(folder: Path, model: Model) -> None:
    """The folder of configs and vocabulary that both sides are given, in the diffusers layout without weights."""
    with torch.device("meta"):
        parts = [build(kind, name, **model.config(kind)) for kind, name in (("denoiser", "unet"), ("autoencoder", "kl"))]
        parts.append(build("conditioner", model.conditioner[0], **model.conditioner[1]))
    written = {name: component for part in parts for name, component in part.to_diffusers().items()}
    index: dict[str, Any] = {"_class_name": model.class_name, "_diffusers_version": "0.35.0"}
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    if model.class_name == "StableDiffusionPipeline":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    for tokenizer in (name for name in written if name.startswith("tokenizer_")):
        shutil.copytree(folder / "tokenizer", folder / tokenizer)
    for name, component in written.items():
        index[name] = [component.library, component.class_name]
        if component.config is not None:
            (folder / name).mkdir()
            config = {"_class_name": component.class_name, **component.config}
            (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps(index))


def load(name: str, file: Path, configs: Path, dtype: str, threads: int) -> dict[str, Any]:
    """One load in a fresh process."""
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHILD, name, str(file), str(configs), dtype]
    done = subprocess.run(command, cwd=ROOT, env=variables, check=True, capture_output=True, text=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def measured(name: str, dtype: str, chosen: common.Options, place: Path) -> tuple[dict[str, Any], list[str]]:
    """A case, and its row in the table. The file has just been written: it lies in the page cache as far as memory allows."""
    file, configs = place / "model.safetensors", place / "configs"
    model = model_of(name, chosen.quick, configs / "tokenizer")
    if not file.exists():
        write_vocabulary(configs / "tokenizer")
        write_configs(configs, model)
    contents = shapes(model)
    size = sum(2 * torch.Size(shape).numel() for shape in contents.values())
    if not file.exists():
        write_file(file, contents)
    samples: dict[str, list[dict[str, Any]]] = {"ldmkit": [], PEER: []}
    for _ in range((chosen.timing if chosen.quick else TIMING)["rounds"]):
        for side, results in samples.items():
            results.append(load(side, file, configs, dtype, chosen.threads))
    if {result["keys"] for result in samples["ldmkit"]} != {len(contents)}:
        raise SystemExit(f"of {len(contents)} keys, {samples['ldmkit'][0]['keys']} are accounted for")
    times = {side: [result["seconds"] for result in results] for side, results in samples.items()}
    weights = size * (2 if dtype == "float32" else 1)
    peaks = {
        kind: {side: max(result[kind] for result in results) / weights for side, results in samples.items()}
        for kind in ("anonymous", "resident")
    }
    seconds = {side: Spread.of(values) for side, values in times.items()}
    faster = ratio(times, peer=PEER, ours="ldmkit")
    case = {
        "case": {"model": name, "dtype": dtype, "bytes": size, "keys": len(contents)},
        "seconds": seconds,
        "ratios": {f"{PEER}/ldmkit": faster},
        "peak_over_weights": peaks,
    }
    memory = [f"{peaks[kind][side]:.2f}" for side in samples for kind in peaks]
    return case, [name, dtype, *(seconds[side].text() for side in samples), faster.text(), *memory]


def main() -> None:
    """Measure, print, write."""
    chosen = common.options(common.parser(__doc__ or "").parse_args())
    record = common.environment(peers=[PEER])
    cases, rows = [], []
    for name in (SD,) if chosen.quick else (SD, XL):
        with tempfile.TemporaryDirectory() as folder:
            for dtype in (dtype for model, dtype in CASES if model == name):
                if not (chosen.quick and dtype == "float32"):
                    case, row = measured(name, dtype, chosen, Path(folder))
                    cases.append(case)
                    rows.append(row)
    head = [
        "model",
        "dtype",
        "ldmkit, s",
        f"{PEER}, s",
        f"{PEER}/ldmkit",
        "anonymous / weights",
        "resident / weights",
        f"{PEER}: anonymous",
        "resident",
    ]
    common.print_table(record, head, rows)
    timing = chosen.timing if chosen.quick else TIMING
    summary = {"models": [SD] if chosen.quick else [SD, XL]}
    common.report("loading", __doc__ or "", chosen, record, cases=cases, summary=summary, timing=timing)


if __name__ == "__main__":
    main()
