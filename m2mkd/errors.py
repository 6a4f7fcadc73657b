"""Errors a user can cause; each message says what was wrong, shows the value and names a remedy.

The command line turns every `M2MKDError` into one `Error:` line and exit code 1. Children also
inherit the builtin that Python users would catch.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class M2MKDError(Exception):
    """Base of every expected failure."""


class ConfigError(M2MKDError, ValueError):
    """A recipe, key or value that cannot work."""


class DataError(M2MKDError, OSError):
    """A data folder or image that is missing, empty or unreadable."""


class CheckpointError(M2MKDError, OSError):
    """A checkpoint or run folder that is missing, corrupt, foreign or unfinished."""


class BusyError(M2MKDError, RuntimeError):
    """A stage that another job is working on right now."""


class ShapeError(M2MKDError, ValueError):
    """Tensors whose shapes, dtypes or devices do not fit together."""


class NotFiniteError(M2MKDError, ArithmeticError):
    """Values that are NaN where a decision depends on them, such as a router's logits."""


class KernelError(M2MKDError, RuntimeError):
    """Compiled kernels that are missing where they are asked for, or that compute wrong results."""


class TrainingError(M2MKDError, RuntimeError):
    """Training that cannot go on, such as a loss that is not finite."""


class ExportError(M2MKDError, RuntimeError):
    """An export that failed, or whose verification did not pass."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the closest known word, or an empty string."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
