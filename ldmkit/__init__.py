"""ldmkit: latent diffusion from parts that anyone can write.

`import ldmkit` is light: every public name below is imported on first use (PEP 562), so that neither torch nor transformers is
loaded before it is needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ldmkit.checkpoints.parts import load_part as load_part
    from ldmkit.checkpoints.parts import save_part as save_part
    from ldmkit.config import AssetPath as AssetPath
    from ldmkit.config import Config as Config
    from ldmkit.conjunction import And as And
    from ldmkit.continuous import EDMSchedule as EDMSchedule
    from ldmkit.continuous import FlowSchedule as FlowSchedule
    from ldmkit.denoised import Denoised as Denoised
    from ldmkit.errors import ArchitectureMismatchError as ArchitectureMismatchError
    from ldmkit.errors import CheckpointError as CheckpointError
    from ldmkit.errors import ConfigError as ConfigError
    from ldmkit.errors import DataError as DataError
    from ldmkit.errors import InputError as InputError
    from ldmkit.errors import InputTypeError as InputTypeError
    from ldmkit.errors import KernelError as KernelError
    from ldmkit.errors import LdmkitError as LdmkitError
    from ldmkit.errors import MissingDependencyError as MissingDependencyError
    from ldmkit.errors import NumericalError as NumericalError
    from ldmkit.errors import OutputError as OutputError
    from ldmkit.errors import PartClashError as PartClashError
    from ldmkit.errors import PluginError as PluginError
    from ldmkit.errors import UnknownPartError as UnknownPartError
    from ldmkit.guidance import classifier_free as classifier_free
    from ldmkit.guidance import classifier_guided as classifier_guided
    from ldmkit.guidance import combined as combined
    from ldmkit.guidance import thresholded as thresholded
    from ldmkit.guidance import unguided as unguided
    from ldmkit.guidance import within as within
    from ldmkit.interfaces import Autoencoder as Autoencoder
    from ldmkit.interfaces import Condition as Condition
    from ldmkit.interfaces import Conditioner as Conditioner
    from ldmkit.interfaces import Denoise as Denoise
    from ldmkit.interfaces import Denoiser as Denoiser
    from ldmkit.interfaces import Level as Level
    from ldmkit.interfaces import Levels as Levels
    from ldmkit.interfaces import Noise as Noise
    from ldmkit.interfaces import Part as Part
    from ldmkit.interfaces import Posterior as Posterior
    from ldmkit.interfaces import Sampler as Sampler
    from ldmkit.interfaces import SamplerFacts as SamplerFacts
    from ldmkit.interfaces import SamplerState as SamplerState
    from ldmkit.interfaces import Transition as Transition
    from ldmkit.noise import GeneratorNoise as GeneratorNoise
    from ldmkit.noise import KeyedNoise as KeyedNoise
    from ldmkit.noise import NoiseSource as NoiseSource
    from ldmkit.noise import StepNoise as StepNoise
    from ldmkit.noise import keyed_normal as keyed_normal
    from ldmkit.pipeline import Pipeline as Pipeline
    from ldmkit.plugin.registry import available as available
    from ldmkit.plugin.registry import build as build
    from ldmkit.plugin.registry import part_class as part_class
    from ldmkit.plugin.registry import registry as registry
    from ldmkit.plugin.spec import Component as Component
    from ldmkit.plugin.spec import Kernel as Kernel
    from ldmkit.plugin.spec import hookimpl as hookimpl
    from ldmkit.prediction import Model as Model
    from ldmkit.prediction import Prediction as Prediction
    from ldmkit.preview import Preview as Preview
    from ldmkit.preview import load_decoder as load_decoder
    from ldmkit.runs import RunState as RunState
    from ldmkit.runs import Trajectory as Trajectory
    from ldmkit.schedule import NoiseSchedule as NoiseSchedule
    from ldmkit.schedule import Schedule as Schedule
    from ldmkit.spacing import spaced_ratios as spaced_ratios

_HOMES = {
    "ldmkit.checkpoints.parts": "load_part save_part",
    "ldmkit.config": "AssetPath Config",
    "ldmkit.conjunction": "And",
    "ldmkit.continuous": "EDMSchedule FlowSchedule",
    "ldmkit.denoised": "Denoised",
    "ldmkit.errors": "ArchitectureMismatchError CheckpointError ConfigError DataError InputError InputTypeError KernelError "
    "LdmkitError MissingDependencyError NumericalError OutputError PartClashError PluginError UnknownPartError",
    "ldmkit.guidance": "classifier_free classifier_guided combined thresholded unguided within",
    "ldmkit.interfaces": "Autoencoder Condition Conditioner Denoise Denoiser Level Levels Noise Part Posterior Sampler "
    "SamplerFacts SamplerState Transition",
    "ldmkit.noise": "GeneratorNoise KeyedNoise NoiseSource StepNoise keyed_normal",
    "ldmkit.pipeline": "Pipeline",
    "ldmkit.plugin.registry": "available build part_class registry",
    "ldmkit.plugin.spec": "Component Kernel hookimpl",
    "ldmkit.prediction": "Model Prediction",
    "ldmkit.preview": "Preview load_decoder",
    "ldmkit.runs": "RunState Trajectory",
    "ldmkit.schedule": "NoiseSchedule Schedule",
    "ldmkit.spacing": "spaced_ratios",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = ["__version__", *sorted(_HOME_OF)]  # noqa: PLE0604  (computed from the one table above)


def __getattr__(name: str) -> Any:
    """Import a public name on first use, and keep it."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'ldmkit' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
