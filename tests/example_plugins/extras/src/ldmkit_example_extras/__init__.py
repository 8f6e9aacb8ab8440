"""One of each thing beside parts and kernels. Light: targets, and torch, are imported when they are used."""

from collections.abc import Iterable

from ldmkit.plugin.spec import CheckpointFormat, DataSource, GuidanceMethod, Task, TrainingLoss, hookimpl


@hookimpl
def ldmkit_api() -> str:
    """The plugin interface it was written for."""
    return ">=1.0,<2"


@hookimpl
def ldmkit_tasks() -> Iterable[Task]:
    """Variations of an image."""
    yield Task(name="variations", target="ldmkit_example_extras.tasks:variations", summary="An image, drawn again n times.")


@hookimpl
def ldmkit_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """A pipeline in one zip file."""
    yield CheckpointFormat(name="zipped", target="ldmkit_example_extras.zipped:Zipped", summary="A saved pipeline, zipped.")


@hookimpl
def ldmkit_training_losses() -> Iterable[TrainingLoss]:
    """The pseudo-Huber loss."""
    yield TrainingLoss(name="pseudo-huber", target="ldmkit_example_extras.losses:PseudoHuber", summary="Forgives outliers.")


@hookimpl
def ldmkit_data_sources() -> Iterable[DataSource]:
    """Pictures out of nothing."""
    yield DataSource(name="discs", target="ldmkit_example_extras.data:Discs", summary="Bright discs on black.")


@hookimpl
def ldmkit_guidance_methods() -> Iterable[GuidanceMethod]:
    """Guidance that grows with the signal."""
    yield GuidanceMethod(name="rising", target="ldmkit_example_extras.guidance:Rising", summary="Weak at first, then strong.")
