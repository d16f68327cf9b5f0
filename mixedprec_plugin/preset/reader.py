"""Reads one YAML file into plain data with the place of each part, and says all that is wrong.

Stricter than YAML: one document, one mapping, text keys without duplicates, no anchors, aliases,
merge keys or tags, no scalar that YAML 1.1 and YAML 1.2 read differently, and no interpolation but
those of `expressions`.
"""

from __future__ import annotations

import re
from pathlib import Path as FilePath
from typing import Any

import yaml

from mixedprec_plugin.preset.document import Document, Findings, Path, Scalar, join_path, rewrite
from mixedprec_plugin.preset.expressions import ExpressionError, is_interpolated, parse_text
from mixedprec_plugin.preset.model import Location

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_DIGITS = 18

_EXPECTED = "(expected a mapping with 'version' and 'rules')"
_UNQUOTED_GLOB = re.compile(r"""match\s*:\s*(\[\s*)?[*&!%@{?]|^\s*-\s*[*&!%@{?]|[\[,]\s*\*""")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?[0-9]+\.[0-9]*([eE][-+][0-9]+)?")
_FLOAT_1_2 = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_OCTAL_1_2 = re.compile(r"0o[0-7]+")
_TAG = "tag:yaml.org,2002:"
_TOO_DEEP = (f"nested more than {MAX_DEPTH} deep", "a preset needs four levels", "depth")
_POINT = "point at the value with an interpolation such as ${schemes.NAME}"


def read_file(path: FilePath, findings: Findings) -> Document:
    """Read a preset file.

    Returns:
        Its data and places; data is None where the file cannot be read as YAML at all. After
        problems the data is there to look for more of them, not to be used.
    """
    document = Document(str(path), findings)
    try:
        if path.is_dir():
            document.report((), "is a folder (expected a YAML file)", rule="file")
            return document
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            what = f"has {size} bytes (expected {MAX_FILE_BYTES} at most)"
            document.report((), what, "a preset is a few kilobytes of rules", "file")
            return document
        content = path.read_bytes()
    except FileNotFoundError:
        document.report((), "no such file (expected a preset)", rule="file")
        return document
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        document.report((), what, "check the path and its permissions", "file")
        return document
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len((content[: error.start] + b"x").splitlines())
        what = f"byte {content[error.start]:#04x} is not UTF-8"
        findings.add(Location(str(path), line), what, "save the file as UTF-8", "encoding")
        return document
    return read_text(text, str(path), findings)


def read_text(text: str, name: str, findings: Findings) -> Document:
    """Read YAML text as `read_file` does; `name` stands for the file in messages."""
    return _Reader(text, Document(name, findings), is_file=True).read()


def read_value(text: str, name: str, findings: Findings) -> Document | None:
    """Read a single YAML value, such as that of an override; an empty text is null."""
    reader = _Reader(text, Document(name, findings), is_file=False)
    document = reader.read()
    return None if reader.has_stopped else document


def read_data(data: Any, name: str, findings: Findings) -> Document:
    """Check plain data as `read_text` does text."""
    document = Document(name, findings)
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        level = [
            below
            for value in level
            if isinstance(value, dict | list)
            for below in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        document.report((), *_TOO_DEEP)
        return document
    document.data = rewrite(data, lambda path, value: _checked(document, path, value))
    return document


def _checked(document: Document, path: Path, value: Scalar) -> Scalar:
    """The value of a scalar; None where it is text with an interpolation that presets lack."""
    if is_interpolated(value):
        try:
            parse_text(value)
        except ExpressionError as error:
            document.report(path, str(error), error.remedy, error.rule)
            return None
    return value


class _StoppedError(Exception):
    """What follows cannot be read."""


class _SurprisingError(Exception):
    """A scalar that another YAML reader would take for something else."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.remedy = remedy


class _Reader:
    """Builds plain data from parser events; the parser itself constructs nothing."""

    def __init__(self, text: str, document: Document, is_file: bool) -> None:
        self.text = text
        self.document = document
        self.is_file = is_file
        self.has_stopped = False
        self.loader: Any = None

    def read(self) -> Document:
        try:
            self.loader = yaml.SafeLoader(self.text)
            self.document.data = self._document()
        except yaml.reader.ReaderError as error:
            line = len((self.text[: error.position] + "x").splitlines())
            code = error.character if isinstance(error.character, int) else ord(error.character)
            what = f"the character U+{code:04X} is not allowed in YAML"
            self._stop(line, what, "remove it")
        except yaml.MarkedYAMLError as error:
            self._stop_at_syntax(error)
        except _StoppedError:
            self.has_stopped = True
        return self.document

    def _document(self) -> Any:
        self.loader.get_event()
        if self.loader.check_event(yaml.StreamEndEvent):
            if self.is_file:
                self._problem((), 0, f"the file is empty {_EXPECTED}", "", "not-a-mapping")
            return None
        self.loader.get_event()
        data = self._value((), self._line())
        self.loader.get_event()
        if not self.loader.check_event(yaml.StreamEndEvent):
            what = "a second document starts (expected one)"
            self._problem((), self._line(), what, "keep one preset in a file", "documents")
        if self.is_file and not isinstance(data, dict):
            what = f"{_kind(data)} is not a preset {_EXPECTED}"
            self._problem((), self.document.places[()].line, what, "", "not-a-mapping")
            return None
        return data

    def _value(self, path: Path, key_line: int) -> Any:
        """Read what stands at a path; a mapping or a list has the line of its key."""
        line = self._line()
        event = self.loader.get_event()
        is_container = isinstance(event, yaml.CollectionStartEvent)
        self.document.places[path] = self._place(path, key_line if is_container else line)
        if isinstance(event, yaml.AliasEvent):
            what = f"the alias *{event.anchor} is not read in presets"
            remedy = f"quote it if it is a pattern ('\"*{event.anchor}\"'), else {_POINT}"
            self._problem(path, line, what, remedy, "alias")
            return None
        if event.anchor is not None:
            what = f"the anchor &{event.anchor} is not read in presets"
            self._problem(path, line, what, _POINT, "alias")
        if event.tag is not None and event.tag != "!":
            what = f"the tag {event.tag.replace(_TAG, '!!')} is not read in presets"
            self._problem(path, line, what, "leave it out; put quotes around text", "tag")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path, line)
        if len(path) >= MAX_DEPTH:
            self._problem((), line, *_TOO_DEEP)
            raise _StoppedError
        return self._list(path) if isinstance(event, yaml.SequenceStartEvent) else self._map(path)

    def _list(self, path: Path) -> list[Any]:
        items: list[Any] = []
        while not self.loader.check_event(yaml.SequenceEndEvent):
            items.append(self._value((*path, len(items)), self._line()))
        self.loader.get_event()
        return items

    def _map(self, path: Path) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        while not self.loader.check_event(yaml.MappingEndEvent):
            line = self._line()
            key = self._key(path, line)
            below = (*path, key)
            if key not in entries:
                entries[key] = self._value(below, line)
                continue
            places, self.document.places = self.document.places, {}
            self._value(below, line)
            line, self.document.places = self.document.places[below].line, places
            first = f" (first on line {places[below].line})" if self.is_file else ""
            what = f"{key!r} stands here a second time{first}"
            self._problem(below, line, what, "keep one of them", "duplicate-key")
        self.loader.get_event()
        return entries

    def _key(self, path: Path, line: int) -> str:
        if not self.loader.check_event(yaml.ScalarEvent):
            value = self._value((*path, f"<line {line}>"), line)
            what = f"{_kind(value)} is used as a key (expected text)"
            remedy = "put quotes around a value that starts with '{' or '['"
            self._problem(path, line, what, remedy, "key")
            return f"<line {line}>"
        event = self.loader.get_event()
        text: str = event.value
        if event.tag is not None:
            self._problem(path, line, f"the key {text!r} has a tag", "leave it out", "tag")
        if event.tag is not None or not event.implicit[0]:
            return text
        kind = self._kind_of(text)
        if kind == "merge":
            what = "the merge key << is not read in presets"
            remedy = "use 'extends', or an interpolation such as ${schemes.NAME}"
            self._problem(path, line, what, remedy, "merge-key")
        elif kind != "str":
            what = f"the key {text or 'null'} is a YAML {kind} (expected text)"
            self._problem(path, line, what, f"write '\"{text}\"'", "key")
        return text

    def _scalar(self, event: yaml.ScalarEvent, path: Path, line: int) -> Scalar:
        value: Scalar = event.value
        try:
            if event.tag is None and event.implicit[0]:
                value = _read_plain(event.value, self._kind_of(event.value))
        except _SurprisingError as error:
            self._problem(path, line, str(error), error.remedy, "yaml-1.1")
        return _checked(self.document, path, value)

    def _kind_of(self, text: str) -> str:
        """What YAML 1.1 takes an unquoted scalar for: `str`, `bool`, `int`, …"""
        tag: str = self.loader.resolve(yaml.ScalarNode, text, (True, False))
        return tag.removeprefix(_TAG)

    def _line(self) -> int:
        line: int = self.loader.peek_event().start_mark.line
        return line + 1

    def _problem(self, path: Path, line: int, what: str, remedy: str, rule: str) -> None:
        self.document.findings.add(self._place(path, line), what, remedy, rule)
        self.document.mark(path)

    def _place(self, path: Path, line: int) -> Location:
        return Location(self.document.file, line if self.is_file else 0, join_path(path))

    def _stop(self, line: int, what: str, remedy: str) -> None:
        self._problem((), line, what, remedy, "syntax")
        self.has_stopped = True

    def _stop_at_syntax(self, error: yaml.MarkedYAMLError) -> None:
        mark = error.problem_mark or error.context_mark
        assert mark is not None
        source = (mark.get_snippet(0, MAX_FILE_BYTES) or "").partition("\n")[0]
        remedy = ""
        if "\t" in source[: len(source) - len(source.lstrip())]:
            remedy = "indent with spaces, not tabs"
        elif "${" in source:
            remedy = 'within { } or [ ] put interpolations in quotes: "${schemes.NAME}"'
        elif _UNQUOTED_GLOB.search(source):
            remedy = 'put patterns in quotes: match: "*.q_proj"'
        self._stop(mark.line + 1, f"is not YAML: {error.problem or error.context}", remedy)


def _read_plain(text: str, kind: str) -> Scalar:
    """Turn an unquoted scalar into a value.

    Args:
        kind: what YAML 1.1 takes it for.
    Raises:
        _SurprisingError: YAML 1.1 and YAML 1.2 disagree about it, or no preset needs it.
    """
    is_octal = _OCTAL_1_2.fullmatch(text) is not None
    if (kind == "int" or is_octal) and len(text) > MAX_DIGITS:
        what = f"{text[:20]}… has more than {MAX_DIGITS} digits"
        raise _SurprisingError(what, "write a smaller number")
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind == "int" and _INT.fullmatch(text):
        return int(text)
    if kind == "float" and _FLOAT.fullmatch(text):
        return float(text)
    if kind == "str" and not is_octal and not _FLOAT_1_2.fullmatch(text):
        return text
    shown = text if len(text) < 40 else f"{text[:20]}…"
    what, instead = _surprise(text, kind)
    raise _SurprisingError(f"{shown} {what}", f"write {instead}'\"{shown}\"'")


def _surprise(text: str, kind: str) -> tuple[str, str]:
    """Why an unquoted scalar is refused, and what else than quotes would do."""
    if kind == "bool":
        meant = "true" if text.lower() in ("yes", "on") else "false"
        return f"is {meant} in YAML 1.1 and text in YAML 1.2", f"{meant} or "
    if kind in ("int", "float") and ":" in text:
        return "is a number in base 60 in YAML 1.1 and text in YAML 1.2", ""
    if kind == "int":
        digits = text.replace("_", "").lower()
        start = digits.lstrip("+-")[:2]
        try:
            value = int(digits, {"0x": 16, "0b": 2}.get(start, 8 if start[:1] == "0" else 10))
        except ValueError:  # such as 0x_
            return "is a number in YAML 1.1 and text in YAML 1.2", ""
        return f"is {value} in YAML 1.1 and may be something else in YAML 1.2", f"{value} or "
    if kind == "float":
        return "is not a plain decimal number", "it as in 0.5, or "
    if kind != "str":
        return "is a date in YAML" if kind == "timestamp" else "means something in YAML", ""
    if _OCTAL_1_2.fullmatch(text):
        value = int(text[2:], 8)
        return f"is text in YAML 1.1 and {value} in YAML 1.2", f"{value} or "
    number = float(text)
    plain = f"{int(number) if number.is_integer() else number} or "
    what = "is text in YAML 1.1 and a number in YAML 1.2"
    return what, plain if len(text) <= MAX_DIGITS else ""


def _kind(data: Any) -> str:
    kinds: dict[type, str] = {dict: "a mapping", list: "a list"}
    return kinds.get(type(data)) or repr(data)
