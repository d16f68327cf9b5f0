"""The commands that the documents and `--help` show, as a reader would type them."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mixedprec_plugin.cli.main import VERBS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_PROGRAMS = ("mixedprec", "sglang", "make", "pip", "python", "docker")
_FILE = re.compile(r"<!-- file: (\S+) -->\n```yaml\n(.*?)```", re.DOTALL)
_LINE = re.compile(r"^ {4}(?:\$ )?(\w+ .*)$")
_SPAN = re.compile(r"`(\w+ [^`]+)`")
_OPTIONAL = re.compile(r"\[(-[^]]*)\]")
# what is said behind a command
_COMMENT = re.compile(r"\s{3,}.*$")


class Command(NamedTuple):
    """A command.

    Attributes:
        place: file and line.
        is_whole: whether it stands on a line of its own, and is not the name of one in a sentence.
        output: the lines that are shown below it.
    """

    place: str
    words: tuple[str, ...]
    is_whole: bool
    output: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


def commands_of(page: Path) -> list[Command]:
    """The commands of a page: its lines in order, then those in sentences and tables."""
    text = page.read_text(encoding="utf-8")
    lines = text.replace("\\\n", " ").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        if (block := _LINE.match(line)) and (words := _words(block[1])):
            rest = lines[number:] if line.startswith("    $ ") else []
            output = tuple(_until_the_next(rest))
            found.append(Command(f"{page.name}:{number}", words, True, output))
    for span in _SPAN.finditer(re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)):
        if words := _words(" ".join(span[1].split())):
            found.append(Command(page.name, words, False))
    return found


def examples() -> list[Command]:
    """The examples of every verb's `--help`."""
    found = []
    for verb, (module, _) in VERBS.items():
        for line in importlib.import_module(module).EXAMPLES.strip("\n").splitlines():
            words = shlex.split(_COMMENT.sub("", line.strip()).partition(" > ")[0])
            found.append(Command(f"mixedprec {verb} --help", tuple(words), True))
    return found


def files_of(page: Path) -> dict[str, str]:
    """Name -> content of the files that a page has its reader write."""
    return dict(_FILE.findall(page.read_text(encoding="utf-8")))


def _until_the_next(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("    ") or line.startswith("    $ "):
            return
        yield line.strip()


def _words(text: str) -> tuple[str, ...]:
    """The words of a command, with what is in brackets; none where it is no command."""
    try:
        words = shlex.split(_OPTIONAL.sub(r"\1", text), comments=True)
    except ValueError:
        return ()
    if len(words) < 2 or words[0] not in _PROGRAMS or "…" in text:
        return ()
    return tuple(words)
