"""What denoisers promise: a raw prediction for each image, from its latents, its time and its condition alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ldmkit.continuous import make_schedule
from ldmkit.errors import InputError
from ldmkit.interfaces import Condition, Denoiser
from ldmkit.prediction import Model, Prediction
from ldmkit.testing.conformance.common import properties_of_all
from ldmkit.testing.conformance.core import Property, Refused, Subject, Trial, alike, apart, same_bits
from ldmkit.testing.conformance.modules import properties_of_networks

TOKENS = 5
KIND = "ldmkit.Denoiser"


def told(subject: Subject, config: Any) -> Mapping[str, int]:
    """Channels of fields in this config, as the subject says. Raises: InputError where it names a config field there is not."""
    if callable(subject.condition):
        return subject.condition(config)
    named = [value for value in subject.condition.values() if isinstance(value, str)]
    lacking = [name for name in named if name not in type(config).model_fields]
    if lacking:
        raise InputError(f"condition = {dict(subject.condition)}: the config has no field {', '.join(lacking)}")
    found = {name: getattr(config, v) if isinstance(v, str) else v for name, v in subject.condition.items()}
    return {name: value for name, value in found.items() if value}


def channels(part: Denoiser, t: Trial) -> Mapping[str, int]:
    """Of each field that the network accepts, as the subject says."""
    found = told(t.subject, part.config)
    lacking = sorted(part.accepts - set(found) - {"guidance_B"})
    assert not lacking, f"the subject does not say how many channels {', '.join(lacking)} has; give condition={{...}}"
    return found


def size(part: Denoiser, t: Trial) -> tuple[int, int]:
    """Height and width of the case's latents."""
    return part.multiple_of * int(t.case["height"]), part.multiple_of * int(t.case["width"])


def latents(part: Denoiser, t: Trial, *, stream: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(B, in_channels less those of `spatial_BCHW`, H, W)"""
    beside = channels(part, t).get("spatial_BCHW", 0) if "spatial_BCHW" in part.accepts else 0
    return t.normal(t.batch, part.in_channels - beside, *size(part, t), stream=stream, dtype=dtype)


def times(t: Trial, dtype: torch.dtype = torch.float32) -> Tensor:
    """One for each image, all different."""
    return torch.tensor([17 + 291 * i for i in range(t.batch)], dtype=dtype)


def condition_of(part: Denoiser, t: Trial, *, stream: int = 0, dtype: torch.dtype = torch.float64) -> Condition:
    """All that the network accepts; another `stream`, other values."""
    wide, made = channels(part, t), dict[str, Any]()
    for i, name in enumerate(sorted(part.accepts)):
        shape = {"tokens_BLC": (TOKENS, wide.get(name, 0)), "vector_BC": (wide.get(name, 0),), "guidance_B": ()}.get(name)
        if name == "labels_B":
            made[name] = (torch.arange(t.batch) + stream) % wide[name]
        elif name == "spatial_BCHW":
            made[name] = t.normal(t.batch, wide[name], *size(part, t), stream=100 * stream + i, dtype=dtype)
        elif shape is not None:
            made[name] = t.normal(t.batch, *shape, stream=100 * stream + i, dtype=dtype)
    return Condition(**made)


def use(part: Any, t: Trial, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """One prediction."""
    return (part(latents(part, t, dtype=dtype), times(t), condition_of(part, t, dtype=dtype)),)


def says_what_it_takes(t: Trial) -> None:
    """`in_channels`, `out_channels` and `multiple_of` are whole numbers from 1; `requires` is part of `accepts`, both of them
    names of `Condition` fields.
    """
    part = t.build()
    for name in ("in_channels", "out_channels", "multiple_of"):
        value = getattr(part, name, None)
        assert isinstance(value, int) and value >= 1, f"{name} is {value!r}"
    for name in ("accepts", "requires"):
        value = getattr(part, name, None)
        assert isinstance(value, frozenset), f"{name} is {value!r}, no frozenset"
        strange = sorted(value - set(Condition.FIELDS))
        assert not strange, f"{name} has {', '.join(strange)}, which no Condition has"
    assert "mask_BL" not in part.accepts, "mask_BL goes with tokens_BLC, and is not in `accepts`"
    assert part.requires <= part.accepts, f"requires {sorted(part.requires)} and accepts {sorted(part.accepts)}"


def shapes(t: Trial) -> None:
    """The prediction is (B, out_channels, H, W) for every height and width that is a multiple of `multiple_of`."""
    part = t.network()
    want = (t.batch, part.out_channels, *size(part, t))
    (y,) = use(part, t, torch.float64)
    assert tuple(y.shape) == want, f"shape {tuple(y.shape)}, not {want}"


def any_time(t: Trial) -> None:
    """`t_B` may have any float or int dtype, one time for each image, whole or not, and the prediction follows it."""
    part = t.network()
    x, condition = latents(part, t), condition_of(part, t)
    want = part(x, times(t, torch.float64), condition)
    for dtype in (torch.float32, torch.int64, torch.int32):
        got = part(x, times(t, dtype), condition)
        assert alike(got.float(), want.float()), f"times in {dtype}: {apart(got, want)}"
    same = x[:1].expand_as(x)
    alone = condition[:1].map(lambda value: value.expand(t.batch, *value.shape[1:]))
    each = part(same, times(t, torch.float64), alone)
    assert not alike(each[:1], each[1:2]), "two images at different times, alike otherwise, get the same prediction"
    between = part(x, times(t, torch.float64) + 0.5, condition)
    assert not alike(between, want), "half a time step later, the prediction is the same"


def independent(t: Trial) -> None:
    """An image's prediction does not depend on its neighbours, nor on its place in the batch."""
    part = t.network()
    x, time, condition = latents(part, t), times(t, torch.float64), condition_of(part, t)
    want = part(x, time, condition)
    turned = part(x.flip(0), time.flip(0), condition.map(lambda value: value.flip(0))).flip(0)
    assert alike(turned, want), f"in another order: {apart(turned, want)}"
    alone = part(x[1:2], time[1:2], condition[1:2])
    assert alike(alone, want[1:2]), f"alone: {apart(alone, want[1:2])}"


def latents_used(t: Trial) -> None:
    """The prediction depends on the latents."""
    part = t.network()
    time, condition = times(t), condition_of(part, t)
    one, other = (part(latents(part, t, stream=stream), time, condition) for stream in (0, 1))
    assert not alike(one, other), "other latents, the same prediction"


def condition_used(t: Trial) -> None:
    """Every field that a denoiser accepts changes its prediction; what it does not accept is an InputError from `check`, and so
    is what it requires and does not get.
    """
    part = t.network()
    x, time, condition, other = latents(part, t), times(t), condition_of(part, t), condition_of(part, t, stream=1)
    want = part(x, time, condition)
    for name in sorted(part.accepts):
        changed = _with(condition, name, getattr(other, name))
        assert not alike(part(x, time, changed), want), f"another {name} gives the same prediction: it is ignored"
    part.check(condition)
    for name in sorted(set(Condition.FIELDS) - {"mask_BL"} - part.accepts):
        _refused(part, _with(condition, name, torch.zeros(t.batch, 1, 1, 1)), f"{name} is not accepted")
    for name in sorted(part.requires):
        _refused(part, _with(condition, name, None), f"{name} is required")


def _with(condition: Condition, name: str, value: Tensor | None) -> Condition:
    changes: dict[str, Any] = {name: value}
    return dataclasses.replace(condition, **changes)


def _refused(part: Denoiser, condition: Condition, why: str) -> None:
    try:
        part.check(condition)
    except InputError:
        return
    raise AssertionError(f"{why}, and check() says nothing of a condition with {sorted(condition.given())}")


def mask(t: Trial) -> None:
    """Tokens whose `mask_BL` is False have no influence, as if they were not there; a mask that is all True is no mask."""
    part = t.network()
    x, time, condition = latents(part, t), times(t), condition_of(part, t)
    tokens = condition.tokens_BLC
    if tokens is None:
        raise Refused("it takes no tokens in this config")
    all_seen = torch.ones(tokens.shape[:2], dtype=torch.bool)
    want = part(x, time, condition)
    seen = part(x, time, part.prepare(dataclasses.replace(condition, mask_BL=all_seen)))
    assert alike(seen, want), f"with a mask that hides nothing: {apart(seen, want)}"
    padded = torch.cat([tokens, 3 * t.normal(t.batch, 2, tokens.shape[2], stream=9)], dim=1)
    hidden = torch.cat([all_seen, torch.zeros(t.batch, 2, dtype=torch.bool)], dim=1)
    got = part(x, time, part.prepare(dataclasses.replace(condition, tokens_BLC=padded, mask_BL=hidden)))
    assert alike(got, want), f"with two masked tokens more: {apart(got, want)}"


def prepared(t: Trial) -> None:
    """`prepare` puts what does not depend on the step into the condition, never into the module, and changes no prediction."""
    part = t.network()
    condition, other = condition_of(part, t), condition_of(part, t, stream=1)
    want = part(latents(part, t), times(t), condition)
    first = part.prepare(condition)
    part.prepare(other)
    got = part(latents(part, t), times(t), first)
    assert alike(got, want), f"prepared, and then prepared for another condition: {apart(got, want)}"
    turned = first.map(lambda value: value.flip(0))
    again = part(latents(part, t).flip(0), times(t).flip(0), turned).flip(0)
    assert alike(again, want), f"a prepared condition, its batch turned: {apart(again, want)}"


def arguments_kept(t: Trial) -> None:
    """The network writes into none of its arguments."""
    part = t.network()
    x, time, condition = latents(part, t), times(t, torch.float64), condition_of(part, t)
    copies = x.clone(), time.clone(), condition.map(torch.clone)
    part(x, time, part.prepare(condition))
    assert same_bits(x, copies[0]), "it writes into x_BCHW"
    assert same_bits(time, copies[1]), "it writes into t_B"
    for name in condition.given():
        assert same_bits(getattr(condition, name), getattr(copies[2], name)), f"it writes into {name}"


TYPES = ("epsilon", "v_prediction", "sample", "flow", "edm")


def prediction(t: Trial) -> None:
    """What a raw prediction means is for `Prediction` alone to say: at levels of any schedule D is read from it by formula, and
    the network can be trained to any of the targets.
    """
    part = t.network()
    condition = condition_of(part, t)
    for name in TYPES:
        reading = Prediction(Prediction.Config.parse({"type": name, "sigma_data": 0.5 if name == "edm" else None}))
        for schedule in ({}, {"kind": "flow"}, {"kind": "edm"}):
            made = make_schedule(schedule)
            level = made.level(made.timesteps(5)[2])
            x = level.scale * latents(part, t)
            raw = part(x / reading.input_scale(level), torch.full((t.batch,), level.t, dtype=torch.float64), condition)
            if raw.shape == x.shape:
                got, want = Model(part, reading)(x, level, condition), reading.to_x0(raw, x, level)
                assert alike(got, want), f"{name} at {level}: {apart(got, want)}"
    for name in TYPES[:4]:
        before, after = _training(t, Prediction(Prediction.Config.parse({"type": name})))
        assert after < 0.5 * before, (
            f"trained on one batch of {name} targets, the loss is {after:.3g}, where predicting nothing gives {before:.3g}"
        )


@torch.enable_grad()
def _training(t: Trial, reading: Prediction, steps: int = 60) -> tuple[float, float]:
    """The loss of predicting zero, and the least that is met while a fresh network learns one batch by heart."""
    part = t.build().train()
    x0, noise, condition = latents(part, t, stream=1), latents(part, t, stream=2), condition_of(part, t)
    x0, noise, condition = x0.float(), noise.float(), condition.to(dtype=torch.float32)
    alpha_B = sigma_B = torch.full((t.batch,), 0.5**0.5)
    target = reading.target(x0, noise, alpha_B, sigma_B)
    if target.shape[1] != part.out_channels:  # a learned variance, say: what follows the prediction is its own affair
        target = torch.cat([target, torch.zeros(t.batch, part.out_channels - target.shape[1], *target.shape[2:])], dim=1)
    x = (0.5**0.5) * (x0 + noise)
    optimizer, best = torch.optim.Adam(part.parameters(), lr=1e-2), float("inf")
    for _ in range(steps):
        loss = nn.functional.mse_loss(part(x, times(t), condition), target)
        best = min(best, float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if best < 0.4 * float(target.square().mean()):
            break
    return float(target.square().mean()), best


def _no_tokens(subject: Subject) -> str | None:
    if isinstance(subject.configs, st.SearchStrategy):
        known = callable(subject.condition) or "tokens_BLC" in subject.condition
    else:
        configs = [subject.part.Config.parse(values) for values in subject.fixed_configs() or ({},)]
        known = any(told(subject, config).get("tokens_BLC") for config in configs)
    return None if known else "it takes no tokens"


PROPERTIES = (
    *properties_of_all(use, KIND),
    *properties_of_networks(use, KIND, ("forward",), fullgraph=True),
    Property("says what it takes", says_what_it_takes, KIND),
    Property("shapes", shapes, "ldmkit.Denoiser.forward"),
    Property("any times, each image its own", any_time, "ldmkit.Denoiser.forward"),
    Property("images are independent", independent, "ldmkit.Denoiser.forward"),
    Property("latents are used", latents_used, "ldmkit.Denoiser.forward"),
    Property("the condition is used", condition_used, "ldmkit.Denoiser.check"),
    Property("masked tokens are not there", mask, "ldmkit.Condition", absent=_no_tokens),
    Property("prepare", prepared, "ldmkit.Denoiser.prepare"),
    Property("arguments are kept", arguments_kept, "ldmkit.Denoiser.forward"),
    Property("prediction types", prediction, "ldmkit.Prediction", once=True),
)
