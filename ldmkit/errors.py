"""Every error a user can meet, in one hierarchy.

Each message says what was wrong with the offending values, and the way out. Catch `LdmkitError` to catch them all; each class
also derives from the built-in a caller would expect (`ValueError`, `TypeError`, `LookupError`, `OSError`, `ImportError`).
"""


class LdmkitError(Exception):
    """The root of all errors raised on purpose by ldmkit."""


class ConfigError(LdmkitError, ValueError):
    """A config or a recipe has an unknown key, a wrong type or an impossible value."""


class InputError(LdmkitError, ValueError):
    """An argument of a call has a value that cannot be served."""


class InputTypeError(LdmkitError, TypeError):
    """An argument of a call has the wrong type."""


class NumericalError(LdmkitError, ArithmeticError):
    """A part produced NaN or infinity; the message names the part and the step."""


class UnknownPartError(LdmkitError, LookupError):
    """No plugin offers a part of that kind and name."""


class PartClashError(LdmkitError, LookupError):
    """Two distributions offer a part of the same kind and name."""


class PluginError(LdmkitError):
    """A plugin could not be loaded, or broke one of its promises."""


class MissingDependencyError(LdmkitError, ImportError):
    """An optional package is needed; the message says how to install it."""


class CheckpointError(LdmkitError, OSError):
    """A weights file is missing, truncated, corrupt or of the wrong kind; the message names file and key."""


class ArchitectureMismatchError(CheckpointError):
    """Weights and model do not fit; the message lists every missing, unexpected and misshapen key."""


class DataError(LdmkitError, OSError):
    """Training data is missing, empty or unreadable; the message names and counts the files."""


class OutputError(LdmkitError, OSError):
    """A result cannot be written where it was asked for."""


class KernelError(LdmkitError, RuntimeError):
    """A kernel backend was forced that cannot serve the call, or a kernel failed."""
