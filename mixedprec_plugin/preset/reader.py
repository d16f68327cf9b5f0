"""Reads one YAML file into a tree of located nodes, and says everything that is wrong with it.

Stricter than YAML: one document, one mapping, text keys without duplicates, no anchors, aliases,
merge keys or tags, and no scalar that YAML 1.1 and YAML 1.2 read differently.
"""

from __future__ import annotations

import re
from pathlib import Path as FilePath
from typing import Any

import yaml

from mixedprec_plugin.preset.findings import Findings
from mixedprec_plugin.preset.model import Location
from mixedprec_plugin.preset.scalars import SurprisingScalarError, read_scalar
from mixedprec_plugin.preset.tree import Node, Path, join_path

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 32

_UNQUOTED_GLOB = re.compile(r"""match\s*:\s*(\[\s*)?[*&!%@{?]|^\s*-\s*[*&!%@{?]|[\[,]\s*\*""")


def read_file(path: FilePath, findings: Findings) -> Node | None:
    """Read a preset file.

    Returns:
        The tree, or None where the file cannot be read as YAML at all. After problems the tree is
        there to look for more of them, not to be used.
    """
    file = Location(str(path), 0)
    try:
        if path.is_dir():
            findings.add(file, "is a folder (expected a YAML file)", rule="file")
            return None
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            what = f"has {size} bytes (expected {MAX_FILE_BYTES} at most)"
            findings.add(file, what, "a preset is a few kilobytes of rules", "file")
            return None
        content = path.read_bytes()
    except FileNotFoundError:
        findings.add(file, "no such file (expected a preset)", rule="file")
        return None
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        findings.add(file, what, "check the path and its permissions", "file")
        return None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"byte {content[error.start]:#04x} is not UTF-8"
        findings.add(Location(str(path), line), what, "save the file as UTF-8", "encoding")
        return None
    return read_text(text, str(path), findings)


def read_text(text: str, name: str, findings: Findings) -> Node | None:
    """Read YAML text as `read_file` does; `name` stands for the file in messages."""
    node = _Reader(text, name, findings).document()
    if node is not None and not isinstance(node.value, dict):
        what = f"{_kind(node)} is not a preset (expected a mapping with 'version' and 'rules')"
        findings.add(node.location, what, rule="not-a-mapping")
        return None
    return node


def read_value(text: str, name: str, findings: Findings) -> Node | None:
    """Read a single YAML value, such as that of an override; an empty text is null."""
    return _Reader(text, name, findings, is_file=False).document()


class _TooDeepError(Exception):
    pass


class _Reader:
    """Builds nodes from parser events; the parser itself constructs nothing."""

    def __init__(self, text: str, name: str, findings: Findings, is_file: bool = True) -> None:
        self.text = text
        self.name = name
        self.findings = findings
        self.is_file = is_file
        self.loader: Any = None

    def document(self) -> Node | None:
        try:
            self.loader = yaml.SafeLoader(self.text)
            try:
                return self._document()
            finally:
                self.loader.dispose()
        except yaml.reader.ReaderError as error:
            self._unprintable(error)
        except yaml.MarkedYAMLError as error:
            self._syntax(error)
        except _TooDeepError:
            pass
        return None

    def _document(self) -> Node | None:
        self.loader.get_event()
        if self.loader.check_event(yaml.StreamEndEvent):
            if not self.is_file:
                return Node(None, Location(self.name, 0))
            what = "the file is empty (expected a mapping with 'version' and 'rules')"
            self.findings.add(Location(self.name, 0), what, rule="not-a-mapping")
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
        return Location(self.name, line if self.is_file else 0, join_path(path))

    def _problem(self, path: Path, line: int, what: str, remedy: str, rule: str) -> None:
        self.findings.add(self._location(path, line), what, remedy, rule)

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
        elif "${" in source:
            remedy = 'within { } or [ ] put interpolations in quotes: "${schemes.NAME}"'
        elif _UNQUOTED_GLOB.search(source):
            remedy = 'put patterns in quotes: match: "*.q_proj"'
        self._problem((), line, what, remedy, "syntax")


def _kind(node: Node) -> str:
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return "a list"
    return repr(node.value)
