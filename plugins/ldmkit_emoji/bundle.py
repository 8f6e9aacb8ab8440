"""Where the package keeps its trained pipeline."""

from __future__ import annotations

from pathlib import Path

from ldmkit.errors import CheckpointError


def folder() -> Path:
    """The folder of the saved pipeline `emoji`, as `ldmkit.Pipeline.from_pretrained` reads it.

    Raises:
        CheckpointError: when the package was installed without its weights.
    """
    path = Path(__file__).parent / "weights"
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is missing: this install of ldmkit has no embedded weights; install a complete wheel, "
            "or train them with the commands in ldmkit_emoji/MODEL_CARD.md"
        )
    return path
