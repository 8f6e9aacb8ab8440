"""What the `config.json`s of diffusers' two U-Net classes have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ldmkit.errors import ConfigError

SAME = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups", "norm_eps", "dropout", "flip_sin_to_cos")
"""Keys that are called and mean the same in ours."""
READ = frozenset(
    {
        *SAME,
        "attention_head_dim",
        "block_out_channels",
        "down_block_types",
        "freq_shift",
        "num_class_embeds",
        "up_block_types",
    }
)
"""Keys of both classes that are read."""
Fixed = Mapping[str, tuple[Any, ...]]
"""Switches, and the values of each that can be served."""


def refused(given: Mapping[str, Any], read: Iterable[str], fixed: Fixed) -> list[str]:
    """What is wrong with a config by its keys and switches, each named with its value."""
    unknown = sorted(set(given) - set(read) - set(fixed))
    return [f"unknown key {key!r} (= {given[key]!r})" for key in unknown] + [
        f"{key} = {given[key]!r} (only {' or '.join(map(repr, allowed))} can be served)"
        for key, allowed in fixed.items()
        if key in given and given[key] not in allowed
    ]


def attention_levels(
    down: Sequence[str],
    up: Sequence[str],
    *,
    known_down: Mapping[str, bool],
    known_up: Mapping[str, bool],
    levels: int,
    config: str,
) -> list[bool]:
    """Which levels have attention, by the names of their blocks.

    Args:
        known_down, known_up: the types of blocks that can be served, and whether each has attention.
        config: what the message of an error begins with.

    Raises:
        ConfigError: for other types, and for ways up that do not mirror the ways down, or are not one for each level.
    """
    unknown = sorted({*down} - {*known_down}) + sorted({*up} - {*known_up})
    if unknown:
        raise ConfigError(f"{config}: block types {unknown} are none of {[*known_down, *known_up]}")
    attended = [known_down[name] for name in down]
    if [known_up[name] for name in up] != attended[::-1] or len(attended) != levels:
        raise ConfigError(
            f"{config}: down_block_types {list(down)} and up_block_types {list(up)} must mirror each other, "
            f"one for each of the {levels} block_out_channels"
        )
    return attended
