"""A denoiser, an autoencoder and a conditioner for every property, broken so that the property does not hold."""

import dataclasses

import pydantic
import torch
from torch import nn

from ldmkit import Condition
from ldmkit.testing import conformance
from tests.testing.good_parts import GoodAutoencoder, GoodConditioner, GoodDenoiser, GoodPosterior


def changed(base, method, change, doc="Broken."):
    """A class whose method gives something else: `change(self, result, *arguments)`."""

    def broken(self, *arguments):
        return change(self, getattr(base, method)(self, *arguments), *arguments)

    return type(f"Broken{base.__name__}", (base,), {"__doc__": doc, method: broken})


def with_init(base, change):
    """A class that does something more when it is made."""

    def broken(self, config):
        base.__init__(self, config)
        change(self)

    return type(f"Broken{base.__name__}", (base,), {"__doc__": "Broken.", "__init__": broken})


def common(base, method, scale):
    """What any network can do wrong. `scale(result, factor)` multiplies what the method gives."""

    class Lax(base):
        """Takes any key."""

        class Config(base.Config):
            """Takes any key."""

            model_config = pydantic.ConfigDict(extra="ignore")

    class Wordless(base):
        """Says nothing of a field."""

        class Config(base.Config):
            """Nothing."""

            mystery: int = 1

    def forget(self):
        (name, *_) = type(self.config).model_fields
        self.config = self.config.replace(**{name: getattr(self.config, name) + 1})

    def count(self, result, *_):
        self.calls = getattr(self, "calls", 0) + 1
        return scale(result, 1 + self.calls / 8)

    def hide(self):
        self.secret = (float(torch.rand(())) + 1,)

    def keep_apart(self):
        self.table = torch.ones(3)

    def round_off(self, result, *_):
        return scale(result, 1.0 if next(self.parameters()).dtype == torch.float32 else 1.01)

    def stop(self):
        self.idle = nn.Parameter(torch.ones(2))

    def notice(self, result, *_):
        return scale(result, 2.0 if torch.compiler.is_compiling() else 1.0)

    return {
        "config is strict": Lax,
        "config round-trips": with_init(base, forget),
        "documented": Wordless,
        "same bits again": changed(base, method, count),
        "no files, network, global random numbers": changed(base, method, lambda self, y, *_: (torch.rand(()), y)[1]),
        "saved and loaded, bit for bit": changed(with_init(base, hide), method, lambda self, y, *_: scale(y, self.secret[0])),
        "device moves": with_init(base, keep_apart),
        "dtype moves": changed(base, method, round_off),
        "gradients reach every parameter": with_init(base, stop),
        "torch.compile": changed(base, method, notice),
    }


def denoiser(part, **options):
    """A subject."""
    return conformance.subject("denoiser", part, condition={"tokens_BLC": 16}, **options)


def whole_times(self, y, x, t_B, condition):
    return GoodDenoiser.forward(self, x, t_B.long(), condition)


def without_mask(self, y, x, t_B, condition):
    return GoodDenoiser.forward(self, x, t_B, dataclasses.replace(condition, mask_BL=None))


def blind(self, y, x, t_B, condition):
    return GoodDenoiser.forward(self, x, t_B, condition.map(torch.zeros_like))


def kept(self, condition, *_):
    self.latest = condition.extra["good.kv"]
    return dataclasses.replace(condition, extra={})


def from_the_latest(self, y, x, t_B, condition):
    return GoodDenoiser.forward(self, x, t_B, dataclasses.replace(condition, extra={"good.kv": getattr(self, "latest", None)}))


DENOISERS = {
    **{
        name: denoiser(part, configs=[{"width": 16}])
        for name, part in common(GoodDenoiser, "forward", lambda y, factor: y * factor).items()
    },
    "says what it takes": denoiser(type("Odd", (GoodDenoiser,), {"requires": frozenset({"tokens_BLC", "labels_B"})})),
    "shapes": denoiser(changed(GoodDenoiser, "forward", lambda self, y, *_: y[:, :, 1:])),
    "any times, each image its own": denoiser(changed(GoodDenoiser, "forward", whole_times)),
    "images are independent": denoiser(changed(GoodDenoiser, "forward", lambda self, y, *_: y - y.mean())),
    "latents are used": denoiser(
        changed(GoodDenoiser, "forward", lambda self, y, x, t_B, c: GoodDenoiser.forward(self, x * 0, t_B, c))
    ),
    "the condition is used": denoiser(changed(GoodDenoiser, "forward", blind)),
    "masked tokens are not there": denoiser(changed(GoodDenoiser, "forward", without_mask)),
    "prepare": denoiser(changed(changed(GoodDenoiser, "prepare", kept), "forward", from_the_latest)),
    "arguments are kept": denoiser(changed(GoodDenoiser, "forward", lambda self, y, x, *_: (x.mul_(2), y)[1])),
    "prediction types": denoiser(changed(GoodDenoiser, "forward", lambda self, y, *_: y.relu())),
}
"""By the property that sees it."""


def scaled(posterior, factor):
    return GoodPosterior(posterior.mean * factor, posterior.scale, posterior.shift)


def posterior_with(**methods):
    """An autoencoder whose posterior has other methods."""
    kind = type("BrokenPosterior", (GoodPosterior,), methods)
    return changed(GoodAutoencoder, "encode", lambda self, p, *_: kind(p.mean, p.scale, p.shift))


def unscaled(self, z):
    return self.up(z)


AUTOENCODERS = {
    **common(GoodAutoencoder, "encode", scaled),
    "geometry": changed(GoodAutoencoder, "decode", lambda self, y, *_: y[:, :, :-4]),
    "posterior": posterior_with(sample=lambda self, noise: self.mode() + 0.1 + noise),
    "images are independent": changed(GoodAutoencoder, "decode", lambda self, y, *_: y - y.mean()),
    "its input is used": changed(GoodAutoencoder, "decode", lambda self, y, *_: torch.zeros_like(y)),
    "scale and shift": type("Unscaled", (GoodAutoencoder,), {"__doc__": "Broken.", "decode": unscaled}),
    "arguments are kept": changed(GoodAutoencoder, "encode", lambda self, y, x: (x.mul_(2), y)[1]),
}
"""By the property that sees it."""


def scaled_condition(condition, factor):
    return dataclasses.replace(condition, tokens_BLC=condition.tokens_BLC * factor)


def masked_with(mask):
    """A conditioner with another mask."""
    return changed(GoodConditioner, "forward", lambda self, c, *_: dataclasses.replace(c, mask_BL=c.mask_BL & mask(c.mask_BL)))


def padded_means(self, condition, *_):
    """Takes the padding into account."""
    return Condition(tokens_BLC=condition.tokens_BLC - condition.tokens_BLC.mean(1, keepdim=True), mask_BL=condition.mask_BL)


class OneCrop(GoodConditioner):
    """Tells all of a batch where the first was cut."""

    def forward(self, inputs, *, crops_coords_top_left=(0, 0)):
        first = torch.as_tensor(crops_coords_top_left).reshape(-1, 2)[:1]
        return super().forward(inputs, crops_coords_top_left=first)


CONDITIONERS = {
    **common(GoodConditioner, "forward", scaled_condition),
    "shapes": changed(GoodConditioner, "forward", lambda self, c, *_: dataclasses.replace(c, vector_BC=c.tokens_BLC[:, 0])),
    "padding and place do not matter": changed(GoodConditioner, "forward", padded_means),
    "the mask shows something": masked_with(lambda mask: mask.cumsum(1) > 1),
    "unconditional": changed(
        GoodConditioner, "forward", lambda self, c, inputs: Condition(vector_BC=c.tokens_BLC[:, 0]) if inputs == [""] else c
    ),
    "inputs are told apart": changed(
        GoodConditioner, "forward", lambda self, c, inputs: GoodConditioner.forward(self, ["x" for _ in inputs])
    ),
    "each picture's own sizes": OneCrop,
    "wrong types": type("Untyped", (GoodConditioner,), {"__doc__": "Broken.", "check": lambda self, inputs: None}),
}
"""By the property that sees it."""
