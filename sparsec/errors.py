"""Every error a user can meet. Each is one line: what, where, expected, got, what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LONG = re.compile(r"\S{401,}")  # names come from files of strangers, and may be as long as these


class SparsecError(Exception):
    """Base of all errors that sparsec raises on purpose.

    `kind` names the class for `--json`, `where` the node, value, file or option concerned (may be empty), `exit_code`
    is the command line's: 1 a check failed, 2 usage or bad input, 3 the environment lacks something.
    """

    exit_code = 2

    def __init__(self, message: str, where: str = "") -> None:
        message, where = _readable(message), _readable(where)
        super().__init__(message)
        self.message = message
        self.where = where

    @property
    def kind(self) -> str:
        """Class name, the `kind` of the JSON form."""
        return type(self).__name__

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


def _readable(text: str) -> str:
    """`text` with words of more than 400 characters shortened to their ends."""
    return _LONG.sub(lambda word: f"{word[0][:200]}...{word[0][-100:]}", text)


def one_line(text: object, most: int = 300) -> str:
    """What other code said (an error, a tool's output), on one line of at most `most` characters."""
    return " ".join(str(text).split())[:most]


class UsageError(SparsecError):
    """An option or argument is wrong, or would overwrite something."""


class ModelError(SparsecError):
    """The model file is missing, damaged or not valid ONNX."""


class UnsupportedError(SparsecError):
    """The model is valid but holds something sparsec cannot compile; lists all of it at once, also as `problems`."""

    def __init__(self, message: str, where: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(message, where)
        self.problems = tuple(problems)


class RecipeError(SparsecError):
    """A pass, a pass option or a recipe file is wrong."""


class DataError(SparsecError):
    """Calibration, verification or input data does not fit the model."""


class TargetError(SparsecError):
    """Unknown target, CPU or operating system."""


class TuningError(SparsecError):
    """A file of measured choices is damaged, or of another CPU or version."""


class ArtifactError(SparsecError):
    """An artifact is incomplete, damaged or from an incompatible version."""


class CheckError(SparsecError):
    """A verification failed: a bug of ours, or a result that misses its tolerance."""

    exit_code = 1


class BuildError(SparsecError):
    """Code generation or linking failed; the tool's output is attached."""

    exit_code = 3


class RuntimeUnavailable(SparsecError):
    """The environment lacks what a runtime needs (an emulator, adb, a CPU feature)."""

    exit_code = 3
