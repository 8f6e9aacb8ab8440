"""What loading a full-size single file costs in time and memory, beside diffusers.

A Stable Diffusion 1.5 file of random fp16 weights under CompVis' names is written to a temporary folder (2 GB). Fresh processes
load it in turn, ldmkit's `Pipeline.from_single_file` and the same of diffusers' StableDiffusionPipeline, in fp16 and in
fp32; imports are not timed. Peak memory is that of anonymous pages (RssAnon, which leaves out the mapped file) and of all
resident pages, beyond what the imports took. Every key of the file is accounted for, or the run fails.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import ROOT, Spread, ratio
from ldmkit import build
from ldmkit.checkpoints.compvis import clip_map, unet_map, vae_map
from ldmkit.checkpoints.filling import skeleton
from ldmkit.plugin.registry import part_class

PEER = "diffusers"
NARROW = {"block_out_channels": [64, 128, 128, 128]}
CLIP = {"vocab_size": 49408}
NARROW_CLIP = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}

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
    import ldmkit_text.clip, ldmkit_unet.unet, ldmkit_vae.autoencoder
    load = lambda: Pipeline.from_single_file(file, config=folder, tokenizer=folder + "/tokenizer", dtype=dtype)
else:
    from diffusers import StableDiffusionPipeline as P
    import diffusers.loaders.single_file, transformers.models.clip.modeling_clip
    load = lambda: P.from_single_file(file, config=folder, torch_dtype=dtype, local_files_only=True, safety_checker=None)
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
keys = [len(a.mapped) + len(a.ignored) for a in getattr(pipe, "accounting", {}).values()]
took = {"seconds": seconds, "anonymous": peak[0] - start[0], "resident": peak[1] - start[1], "keys": sum(keys)}
print("RESULT", json.dumps(took))
"""


def shapes(narrow: bool, vocabulary: Path) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the file."""
    own, vocab = NARROW if narrow else {}, {"vocab": str(vocabulary / "vocab.json"), "merges": str(vocabulary / "merges.txt")}
    context = {"cross_attention_dim": 128} if narrow else {}
    text = {**CLIP, **(NARROW_CLIP if narrow else {}), **vocab}
    parts = {
        "model.diffusion_model": (
            "denoiser",
            "unet",
            {**own, **context},
            unet_map(levels=4, layers_per_block=2, attention=(True,) * 3 + (False,)),
        ),
        "first_stage_model": ("autoencoder", "kl", own, vae_map(levels=4, layers_per_block=2)),
        "cond_stage_model.transformer": ("conditioner", "clip-text", text, clip_map()),
    }
    result = {}
    for prefix, (kind, name, config, keymap) in parts.items():
        cls = part_class(kind, name)
        state = skeleton(cls, cls.Config.parse(config)).state_dict()
        on_meta = {key: torch.empty(value.shape, device="meta") for key, value in state.items()}
        result |= {key: tuple(value.shape) for key, value in keymap.prefixed(prefix).restore(on_meta).items()}
    return result


def write_file(path: Path, contents: dict[str, tuple[int, ...]]) -> int:
    """A safetensors file of random fp16 weights, written tensor by tensor. Returns its bytes of weights."""
    header, end = {}, 0
    for key, shape in contents.items():
        size = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in contents.values():
            file.write((torch.randn(shape, generator=generator) / 50).half().numpy().tobytes())
    return end


def write_configs(folder: Path, narrow: bool) -> None:
    """The folder of configs and vocabulary that both sides are given, in the diffusers layout without weights."""
    folder.mkdir()
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}')
    vocab = {"vocab": str(folder / "tokenizer" / "vocab.json"), "merges": str(folder / "tokenizer" / "merges.txt")}
    own = NARROW if narrow else {}
    with torch.device("meta"):
        unet = build("denoiser", "unet", **own, **({"cross_attention_dim": 128} if narrow else {}))
        vae = build("autoencoder", "kl", **own)
        text = build("conditioner", "clip-text", **CLIP, **(NARROW_CLIP if narrow else {}), **vocab)
    written = {**unet.to_diffusers(), **vae.to_diffusers(), **text.to_diffusers()}
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.35.0"}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None], "feature_extractor": [None, None]}
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


def rounds(file: Path, configs: Path, dtype: str, threads: int, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Both sides in turn. The file has just been written, so it lies in the page cache as far as memory allows."""
    for _ in range(count):
        for name in ("ldmkit", PEER):
            yield name, load(name, file, configs, dtype, threads)


def main() -> None:
    """Measure, print, write."""
    chosen = common.options(common.parser(__doc__ or "").parse_args())
    record = common.environment(peers=[PEER])
    cases, rows = [], []
    with tempfile.TemporaryDirectory() as place:
        file, configs = Path(place) / "model.safetensors", Path(place) / "configs"
        write_configs(configs, chosen.quick)
        contents = shapes(chosen.quick, configs / "tokenizer")
        size = write_file(file, contents)
        for dtype in ("float16",) if chosen.quick else ("float16", "float32"):
            samples: dict[str, list[dict[str, Any]]] = {"ldmkit": [], PEER: []}
            for name, result in rounds(file, configs, dtype, chosen.threads, chosen.timing["rounds"]):
                samples[name].append(result)
            if {result["keys"] for result in samples["ldmkit"]} != {len(contents)}:
                raise SystemExit(f"of {len(contents)} keys, {samples['ldmkit'][0]['keys']} are accounted for")
            times = {name: [result["seconds"] for result in results] for name, results in samples.items()}
            weights = size * (2 if dtype == "float32" else 1)
            peaks = {
                kind: {name: max(result[kind] for result in results) / weights for name, results in samples.items()}
                for kind in ("anonymous", "resident")
            }
            seconds = {name: Spread.of(values) for name, values in times.items()}
            faster = ratio(times, peer=PEER, ours="ldmkit")
            cases.append(
                {
                    "case": {"dtype": dtype, "bytes": size, "keys": len(contents)},
                    "seconds": seconds,
                    "ratios": {f"{PEER}/ldmkit": faster},
                }
                | {"peak_over_weights": peaks}
            )
            memory = [f"{peaks[kind][name]:.2f}" for name in samples for kind in peaks]
            rows.append([dtype, *(seconds[name].text() for name in samples), faster.text(), *memory])
    head = [
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
    common.report("loading", __doc__ or "", chosen, record, cases=cases, summary={"bytes": size})


if __name__ == "__main__":
    main()
