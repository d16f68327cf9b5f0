"""The exceptions of the package, and the problems that they carry.

    MixedPrecisionError
    ├── UsageError          the command line or the call is wrong (exit code 2)
    ├── PresetError         the preset file is wrong
    ├── MethodError         a method or its arguments do not fit the installed SGLang
    ├── CheckpointError     a checkpoint's files are wrong
    ├── PlanError           preset, checkpoint and device do not fit each other
    ├── ShapeError          a tensor's shape or values do not fit a method
    ├── LoadError           the running model and the plan do not fit each other
    ├── ConvertError        an output folder is in the way, or cannot be written
    ├── RegistrationError   the plugin is not whole in this process
    └── ServerError         a server that was started for a measurement failed (evaluate/server.py)

Errors are data: an exception carries every `Problem` that was found, not only the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

Severity = Literal["error", "warning"]


def printable(text: str) -> str:
    """Write what a terminal would obey, or cannot show, as escapes: line breaks, too.

    Names of tensors and files are anybody's. What a text quotes by `repr` is as safe.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, what, and how to cure it.

    Attributes:
        where: file, line and key (`qwen3.yaml:14: rules[2].group_size`), or a layer name.
        what: what is wrong and, in brackets, what was expected.
        remedy: what the reader can do about it; may be empty.
        rule: stable identifier of the check that failed, such as `fused-conflict`.
        severity: only errors stop the work.
        asked_at: where the rules stand that ask for what is wrong with a layer.
    """

    where: str
    what: str
    remedy: str = ""
    rule: str = ""
    severity: Severity = "error"
    asked_at: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return printable(f"{text}; {self.remedy}" if self.remedy else text)


class MixedPrecisionError(Exception):
    """Base of all errors of this package.

    Args:
        problems: what is wrong; a plain string stands for a single problem.
    """

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = Problem("", problems)
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[MixedPrecisionError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class UsageError(MixedPrecisionError):
    """The command line or the call is wrong."""


class PresetError(MixedPrecisionError):
    """The preset file is wrong."""


class MethodError(MixedPrecisionError):
    """A method or its arguments do not fit the installed SGLang."""


class CheckpointError(MixedPrecisionError):
    """A checkpoint's files are wrong."""


class PlanError(MixedPrecisionError):
    """Preset, checkpoint and device do not fit each other."""


class ShapeError(MixedPrecisionError):
    """A tensor's shape or values do not fit a method."""


class LoadError(MixedPrecisionError):
    """The running model and the plan do not fit each other."""


class ConvertError(MixedPrecisionError):
    """An output folder is in the way, or cannot be written."""


class RegistrationError(MixedPrecisionError):
    """The plugin is not whole in this process."""
