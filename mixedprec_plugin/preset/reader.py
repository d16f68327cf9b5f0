"""Reads one YAML file into a tree of located nodes, and says everything that is wrong with it.

Stricter than YAML: one document, one mapping, text keys without duplicates, no anchors, aliases,
merge keys or tags, and no scalar that YAML 1.1 and YAML 1.2 read differently.
"""

from __future__ import annotations

import re
from pathlib import Path as FilePath
from typing import Any

import yaml

from mixedprec_plugin.errors import Problem
from mixedprec_plugin.preset.model import Location
from mixedprec_plugin.preset.scalars import SurprisingScalarError, read_scalar
from mixedprec_plugin.preset.tree import Node, Path, join_path

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 32

_UNQUOTED_GLOB = re.compile(r"""match\s*:\s*(\[\s*)?[*&!%@{?]|^\s*-\s*[*&!%@{?]|[\[,]\s*\*""")


def read_file(path: FilePath) -> tuple[Node | None, list[Problem]]:
    """Read a preset file.

    Returns:
        The tree, or None where the file cannot be read as YAML at all, and all problems. With
        problems, the tree is there to look for more of them, not to be used.
    """
    name = str(path)
    try:
        if path.is_dir():
            return None, [Problem(name, "is a folder (expected a YAML file)", rule="file")]
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            what = f"has {size} bytes (expected {MAX_FILE_BYTES} at most)"
            return None, [Problem(name, what, "a preset is a few kilobytes of rules", "file")]
        content = path.read_bytes()
    except FileNotFoundError:
        return None, [Problem(name, "no such file (expected a preset)", rule="file")]
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        return None, [Problem(name, what, "check the path and its permissions", "file")]
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"byte {content[error.start]:#04x} is not UTF-8"
        return None, [Problem(f"{name}:{line}", what, "save the file as UTF-8", "encoding")]
    return read_text(text, name)


def read_text(text: str, name: str) -> tuple[Node | None, list[Problem]]:
    """Read YAML text as `read_file` does; `name` stands for the file in messages."""
    reader = _Reader(text, name)
    node = reader.document()
    if node is not None and not isinstance(node.value, dict):
        what = f"{_kind(node)} is not a preset (expected a mapping with 'version' and 'rules')"
        reader.problems.append(Problem(str(node.location), what, rule="not-a-mapping"))
        node = None
    return node, reader.problems


def read_value(text: str, name: str) -> tuple[Node | None, list[Problem]]:
    """Read a single YAML value, such as that of an override; an empty text is null."""
    reader = _Reader(text, name)
    node = reader.document(allow_empty=True)
    return node, [
        Problem(name, problem.what, problem.remedy, problem.rule) for problem in reader.problems
    ]


class _TooDeepError(Exception):
    pass


class _Reader:
    """Builds nodes from parser events; the parser itself constructs nothing."""

    def __init__(self, text: str, name: str) -> None:
        self.text = text
        self.name = name
        self.problems: list[Problem] = []
        self.loader: Any = None

    def document(self, allow_empty: bool = False) -> Node | None:
        try:
            self.loader = yaml.SafeLoader(self.text)
            try:
                return self._document(allow_empty)
            finally:
                self.loader.dispose()
        except yaml.reader.ReaderError as error:
            self._unprintable(error)
        except yaml.MarkedYAMLError as error:
            self._syntax(error)
        except _TooDeepError:
            pass
        return None

    def _document(self, allow_empty: bool) -> Node | None:
        self.loader.get_event()
        if self.loader.check_event(yaml.StreamEndEvent):
            if allow_empty:
                return Node(None, Location(self.name, 0))
            what = "the file is empty (expected a mapping with 'version' and 'rules')"
            self.problems.append(Problem(self.name, what, rule="not-a-mapping"))
            return None
        self.loader.get_event()
        node = self._node(())
        self.loader.get_event()
        if not self.loader.check_event(yaml.StreamEndEvent):
            line = self.loader.peek_event().start_mark.line + 1
            self._problem(
                (),
                line,
                "a second document starts (expected one)",
                "keep one preset in a file",
                "documents",
            )
        return node

    def _node(self, path: Path) -> Node:
        event = self.loader.get_event()
        line: int = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            self._problem(
                path,
                line,
                f"the alias *{event.anchor} is not read in presets",
                f"quote it if it is a pattern ('\"*{event.anchor}\"'), else point at the "
                "value with an interpolation such as ${schemes.NAME}",
                "alias",
            )
            return Node(None, self._location(path, line))
        if event.anchor is not None:
            self._problem(
                path,
                line,
                f"the anchor &{event.anchor} is not read in presets",
                "point at the value with an interpolation such as ${schemes.NAME}",
                "alias",
            )
        if event.tag is not None and event.tag != "!":
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._problem(
                path,
                line,
                f"the tag {tag} is not read in presets",
                "leave it out; put quotes around text",
                "tag",
            )
        if isinstance(event, yaml.ScalarEvent):
            return Node(self._scalar(event, path, line), self._location(path, line))
        if len(path) >= MAX_DEPTH:
            self._problem(
                (),
                line,
                f"nested more than {MAX_DEPTH} deep",
                "a preset needs four levels",
                "depth",
            )
            raise _TooDeepError
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path, line)
        return self._mapping(path, line)

    def _scalar(
        self, event: yaml.ScalarEvent, path: Path, line: int
    ) -> str | int | float | bool | None:
        text: str = event.value
        if event.tag is not None or not event.implicit[0]:
            return text
        try:
            return read_scalar(text, self.loader.resolve(yaml.ScalarNode, text, (True, False)))
        except SurprisingScalarError as error:
            self._problem(path, line, str(error), error.remedy, "yaml-1.1")
            return text

    def _sequence(self, path: Path, line: int) -> Node:
        items: list[Node] = []
        while not self.loader.check_event(yaml.SequenceEndEvent):
            items.append(self._node((*path, len(items))))
        self.loader.get_event()
        return Node(items, self._location(path, line))

    def _mapping(self, path: Path, line: int) -> Node:
        entries: dict[str, Node] = {}
        lines: dict[str, int] = {}
        while not self.loader.check_event(yaml.MappingEndEvent):
            key, key_line = self._key(path)
            node = self._node((*path, key))
            if not isinstance(node.value, (dict, list)):
                key_line = max(key_line, node.location.line)
            if key in entries:
                self._problem(
                    (*path, key),
                    key_line,
                    f"{key!r} stands here a second time (first on line {lines[key]})",
                    "keep one of them",
                    "duplicate-key",
                )
                continue
            entries[key] = Node(node.value, self._location((*path, key), key_line))
            lines[key] = key_line
        self.loader.get_event()
        return Node(entries, self._location(path, line))

    def _key(self, path: Path) -> tuple[str, int]:
        event = self.loader.peek_event()
        line: int = event.start_mark.line + 1
        if not isinstance(event, yaml.ScalarEvent):
            node = self._node(path)
            self._problem(
                path,
                line,
                f"{_kind(node)} is used as a key (expected text)",
                "put quotes around a value that starts with '{' or '['",
                "key",
            )
            return f"<line {line}>", line
        self.loader.get_event()
        text: str = event.value
        if event.tag is not None or not event.implicit[0]:
            if event.tag is not None:
                self._problem(path, line, f"the key {text!r} has a tag", "leave it out", "tag")
            return text, line
        tag = self.loader.resolve(yaml.ScalarNode, text, (True, False))
        if tag == "tag:yaml.org,2002:merge":
            self._problem(
                path,
                line,
                "the merge key << is not read in presets",
                "use 'extends', or an interpolation such as ${schemes.NAME}",
                "merge-key",
            )
        elif tag != "tag:yaml.org,2002:str":
            kind = tag.removeprefix("tag:yaml.org,2002:")
            self._problem(
                path,
                line,
                f"the key {text or 'null'} is a YAML {kind} (expected text)",
                f"write '\"{text}\"'",
                "key",
            )
        return text, line

    def _location(self, path: Path, line: int) -> Location:
        return Location(self.name, line, join_path(path))

    def _problem(self, path: Path, line: int, what: str, remedy: str, rule: str) -> None:
        self.problems.append(Problem(str(self._location(path, line)), what, remedy, rule))

    def _unprintable(self, error: yaml.reader.ReaderError) -> None:
        line = self.text.count("\n", 0, error.position) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        self._problem(
            (), line, f"the character U+{code:04X} is not allowed in YAML", "remove it", "syntax"
        )

    def _syntax(self, error: yaml.MarkedYAMLError) -> None:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 0
        what = f"is not YAML: {error.problem or error.context}"
        source = self.text.split("\n")[line - 1] if line else ""
        remedy = ""
        if "\t" in source[: len(source) - len(source.lstrip())]:
            remedy = "indent with spaces, not tabs"
        elif _UNQUOTED_GLOB.search(source):
            remedy = 'put patterns in quotes: match: "*.q_proj"'
        self._problem((), line, what, remedy, "syntax")


def _kind(node: Node) -> str:
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return "a list"
    return repr(node.value)
