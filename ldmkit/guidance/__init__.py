"""Guidance, as closures over D(x, level): whatever a sampler is given is again a plain D, so they nest as one likes.

One file per method. `Guidance` is what a pipeline's call asks for, all of them in one place.
"""

from ldmkit.guidance.classifier import classifier_guided as classifier_guided
from ldmkit.guidance.combination import classifier_free as classifier_free
from ldmkit.guidance.combination import combined as combined
from ldmkit.guidance.combination import unguided as unguided
from ldmkit.guidance.interval import within as within
from ldmkit.guidance.perturbed import perturb as perturb
from ldmkit.guidance.plan import Guidance as Guidance
from ldmkit.guidance.threshold import thresholded as thresholded
