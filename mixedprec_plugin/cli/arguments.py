"""argparse, a little stricter: nothing that is typed is guessed at or passed over."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.names import nearest


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, takes an option once, and raises UsageError."""

    def __init__(self, **options: Any) -> None:
        how = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=how, **options)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; an option that is not known gets the nearest one that is.

        A verb with a default for `passed_on` has what is not known there.
        """
        try:
            parsed, unknown = self.parse_known_args(args, namespace)
        except UsageError:
            # a required option that is misspelt counts as missing
            words = [word for word in args or () if word.startswith("--") and word != "--"]
            self._check_known([] if self.get_default("passed_on") is not None else words)
            raise
        if "passed_on" in parsed:
            parsed.passed_on = unknown[1:] if unknown[:1] == ["--"] else unknown
        else:
            self._check_known(unknown)
        return parsed

    def _check_known(self, words: Sequence[str]) -> None:
        for option in (word.partition("=")[0] for word in words):
            if option not in self._option_string_actions:
                near = nearest(option, self._option_string_actions) if option[0] == "-" else []
                remedy = f"did you mean {' or '.join(near)}?" if near else self._see_help()
                raise UsageError(Problem("", f"unknown argument {option!r}", remedy))

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        # argparse names the function that reads the number
        text = re.sub(r"invalid \w+ value: (.*)", r"\1 is not a number", message)
        raise UsageError(Problem("", text.removeprefix("argument "), self._see_help()))

    @property
    def option_strings(self) -> list[str]:
        """Every option, in the order of the help."""
        return [text for action in self._actions for text in action.option_strings]

    def _see_help(self) -> str:
        return f"see {self.prog} --help"


class _Once(argparse.Action):
    """Store a value, of which there can be one alone."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if option_string and values == "":
            raise argparse.ArgumentError(self, "is empty")
        given = vars(namespace).setdefault("_given", {})
        if self.dest in given:
            first = given[self.dest]
            raise argparse.ArgumentError(self, f"given twice: {first!r} and {values!r}")
        given[self.dest] = values
        setattr(namespace, self.dest, values)


def file_there(text: str) -> Path:
    """Take an existing file from the command line."""
    path = Path(text)
    if not path.exists() or path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


def positive(text: str) -> int:
    """Read a number of at least 1 from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def bits(text: str) -> float:
    """Read a number of bits from the command line."""
    value = float(text)
    if not 0 < value <= 64:
        raise argparse.ArgumentTypeError(f"{text} is not a number of bits (expected 4.5, say)")
    return value


def count(text: str) -> int:
    """Read a number of at least 1, in thousands (of 1,024) where it ends in k."""
    thousands = text.lower().removesuffix("k")
    return positive(thousands) * (1024 if thousands != text.lower() else 1)
