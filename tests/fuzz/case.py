"""One input, how it is run, and what counts as a finding."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import traceback
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import mixedprec_plugin
from mixedprec_plugin.cli.main import main

# of the processor
MAX_SECONDS = 10.0

_PACKAGE = Path(mixedprec_plugin.__file__).parent
_HIDDEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_VARIABLE = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+")


@dataclasses.dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        argv: of `mixedprec`; it runs in the folder of the files.
        files: path -> content in pieces; of a safetensors file the header, then the rest.
    """

    argv: tuple[str, ...]
    files: Mapping[str, tuple[bytes, ...]]

    def write(self, folder: Path) -> None:
        """Write the files, and nothing else, into a folder."""
        shutil.rmtree(folder, ignore_errors=True)
        for name, pieces in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.writelines(pieces)
            os.utime(path, (1, 1))

    def as_text(self) -> str:
        """As a file of the corpus."""
        files: dict[str, Any] = {}
        for name, pieces in self.files.items():
            raw = b"".join(pieces)
            files[name] = {"zlib": base64.b64encode(zlib.compress(raw, 9)).decode()}
            if b"\0" not in raw:
                with contextlib.suppress(UnicodeDecodeError):
                    files[name] = raw.decode()
        return json.dumps({"argv": self.argv, "files": files}, indent=1) + "\n"


def read_case(path: Path) -> Case:
    """Read a file of the corpus."""
    said = json.loads(path.read_text())
    files = {
        name: (x.encode() if isinstance(x, str) else zlib.decompress(base64.b64decode(x["zlib"])),)
        for name, x in said["files"].items()
    }
    return Case(tuple(said["argv"]), files)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an input.

    Attributes:
        code: the exit code; -1 where there is none.
        finding: what is wrong, by its place in the package; empty where nothing is.
        details: the traceback, or the words that are wrong.
        words: what was said, without names and numbers.
    """

    code: int
    finding: str = ""
    details: str = ""
    words: frozenset[str] = frozenset()


class TooLongError(BaseException):
    """An input takes too much time."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stop what takes longer on the processor; for the main thread."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run_case(case: Case, folder: Path) -> Outcome:
    """Run an input in a folder, which it is written to."""
    case.write(folder)
    out, err = io.StringIO(), io.StringIO()
    try:
        with _within(folder), time_limit(MAX_SECONDS):
            code = main(case.argv, out, err)
    # everything that is no exit code is what we are looking for
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Outcome(-1, f"{type(error).__name__} {_place(error)}", traceback.format_exc())
    said = out.getvalue() + err.getvalue()
    details = _fault(case, code, out.getvalue(), said)
    words = frozenset(_VARIABLE.sub("#", line)[:160] for line in said.splitlines())
    return Outcome(code, details and f"{case.argv[0]}: {details[:60]!r}", details, words)


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _fault(case: Case, code: int, out: str, said: str) -> str:
    if hidden := _HIDDEN.search(said):
        return f"{hidden[0]!r} reaches the terminal: {said[max(0, hidden.start() - 80) :][:160]!r}"
    if code not in (0, 1, 2) or (code and not said):
        return f"exit code {code} and {len(said)} characters"
    if "--json" in case.argv and out:
        try:
            json.loads(out, parse_constant=lambda name: 1 / 0)
        except (ValueError, ZeroDivisionError) as error:
            return f"the output is not JSON: {error}"
    return ""


def _place(error: BaseException) -> str:
    """The last line of ours that an exception passed."""
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).is_relative_to(_PACKAGE):
            found = f"{Path(frame.filename).relative_to(_PACKAGE.parent)}:{frame.lineno}"
    return found
