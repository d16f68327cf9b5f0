"""Reads one YAML file into plain data with the place of each part, and says all that is wrong.

Stricter than YAML: one document, one mapping, text keys without duplicates, no anchors, aliases,
merge keys or tags, no scalar that YAML 1.1 and YAML 1.2 read differently, and interpolations of
two forms alone.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import yaml

from mixedprec_plugin.checkpoint.files import open_plain
from mixedprec_plugin.preset.document import Document, Findings, Path, RefusedError, Scalar, rewrite
from mixedprec_plugin.preset.foreign import foreign_kind
from mixedprec_plugin.preset.interpolation import check_text, is_interpolated
from mixedprec_plugin.preset.model import Location

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_DIGITS = 18

_TOO_DEEP = (f"nested more than {MAX_DEPTH} deep", "a preset needs four levels", "depth")
_POINT = "point at the value with an interpolation such as ${schemes.NAME}"
_TAG = "tag:yaml.org,2002:"
_UNQUOTED_GLOB = re.compile(
    r"""match\s*:\s*(\[\s*)?[*&!%@{?]|^\s*-\s*(?:[*&!%@?]|\{[^:]*$)|[\[,]\s*\*"""
)
# the core schema of YAML 1.2; what fits nothing is text
_CORE: tuple[tuple[str, Callable[[str], Scalar]], ...] = (
    (r"~|null|Null|NULL|", lambda _: None),
    (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    (r"[-+]?[0-9]+", int),
    (r"0o[0-7]+", lambda text: int(text[2:], 8)),
    (r"0x[0-9a-fA-F]+", lambda text: int(text, 16)),
    (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    (r"[-+]?\.(inf|Inf|INF)", lambda text: float(text.replace(".", ""))),
)


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
        elif (size := path.stat().st_size) > MAX_FILE_BYTES:
            what = f"has {size} bytes (expected {MAX_FILE_BYTES} at most)"
            document.report((), what, "a preset is a few kilobytes of rules", "file")
        else:
            with open_plain(path) as file:
                data = file.read(MAX_FILE_BYTES)
            return read_text(data.decode("utf-8-sig"), str(path), findings)
    except FileNotFoundError:
        document.report((), "no such file (expected a preset)", rule="file")
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        document.report((), what, "check the path and its permissions", "file")
    except UnicodeDecodeError as error:
        line = _line_of(error.object[: error.start].decode())
        what = f"byte {error.object[error.start]:#04x} is not UTF-8"
        findings.add(Location(str(path), line), what, "save the file as UTF-8", "encoding")
    return document


def read_text(text: str, name: str, findings: Findings) -> Document:
    """Read YAML text as `read_file` does; `name` stands for the file in messages."""
    document = Document(name, findings)
    reader = _Reader(text, document, is_file=True)
    is_read = reader.read()
    if isinstance(document.data, dict) and (other := foreign_kind(document.data)):
        findings.forget(name)
        document.report((), *other, "foreign-file")
        document.data = None
    elif is_read and not isinstance(document.data, dict):
        has_value = document.places[()].line
        what = f"{_kind(document.data)} is not a preset" if has_value else "the file is empty"
        document.report(
            (), f"{what} (expected a mapping with 'version' and 'rules')", rule="not-a-mapping"
        )
        document.data = None
    return document


def read_value(text: str, name: str, findings: Findings) -> Document | None:
    """Read a single YAML value, such as that of an override; an empty text is null."""
    document = Document(name, findings)
    return document if _Reader(text, document, is_file=False).read() else None


def read_data(data: Any, name: str, findings: Findings) -> Document:
    """Check plain data as `read_text` does text."""
    document = Document(name, findings, data)
    if any(len(path) > MAX_DEPTH for path, _ in document.parts()):
        document.report((), *_TOO_DEEP)
        document.data = None
    else:
        document.data = rewrite(data, lambda path, value: _checked(document, path, value))
    return document


def _checked(document: Document, path: Path, value: Scalar) -> Scalar:
    """The value of a scalar; None where it is text with an interpolation that presets lack."""
    try:
        if is_interpolated(value):
            check_text(value)
    except RefusedError as error:
        document.report(path, *error.args)
        return None
    return value


class _TooDeepError(Exception):
    """A mapping or a list, on the line that is given, lies too deep to be read."""


class _Reader:
    """Builds plain data from parser events; the parser itself constructs nothing."""

    def __init__(self, text: str, document: Document, is_file: bool) -> None:
        self.text = text
        self.document = document
        self.is_file = is_file
        self.loader: Any = None

    def read(self) -> bool:
        """Read the document; return whether that was possible."""
        try:
            self.loader = yaml.SafeLoader(self.text)
            self.document.data = self._document()
            return True
        except yaml.reader.ReaderError as error:
            code = error.character if isinstance(error.character, int) else ord(error.character)
            what = f"the character U+{code:04X} is not allowed in YAML"
            line = _line_of(self.text[: error.position])
            self._problem((), line, what, "remove it", "syntax")
        except yaml.MarkedYAMLError as error:
            self._report_syntax(error)
        except (ValueError, OverflowError):  # the scanner's, of chr()
            what = "is not YAML: an escape names no character (expected \\U0010FFFF at most)"
            self._problem((), self.loader.line + 1, what, "remove it", "syntax")
        except _TooDeepError as error:
            self._problem((), error.args[0], *_TOO_DEEP)
        return False

    def _document(self) -> Any:
        self.loader.get_event()
        if self.loader.check_event(yaml.StreamEndEvent):
            return None
        self.loader.get_event()
        data = self._value((), self._line())
        self.loader.get_event()
        if not self.loader.check_event(yaml.StreamEndEvent):
            what = "a second document starts (expected one)"
            self._problem((), self._line(), what, "keep one preset in a file", "documents")
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
            return self._scalar(event, path)
        if len(path) >= MAX_DEPTH:
            raise _TooDeepError(line)
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
            first = self.document.places.get(below) if key in entries else None
            entries[key] = self._value(below, line)
            if first is not None:
                where = f" (first on line {first.line})" if self.is_file else ""
                what = f"{key!r} stands here a second time{where}"
                line = self.document.places[below].line
                self._problem(below, line, what, "keep one of them", "duplicate-key")
        self.loader.get_event()
        return entries

    def _key(self, path: Path, line: int) -> str:
        if not self.loader.check_event(yaml.ScalarEvent):
            text = f"<line {line}>"
            what = f"{_kind(self._value((*path, text), line))} is used as a key (expected text)"
            remedy = "put quotes around a value that starts with '{' or '['"
            self._problem(path, line, what, remedy, "key")
            self.document.mark((*path, text))
            return text
        event = self.loader.get_event()
        text = str(event.value)
        kind = self._old_type(text) if event.implicit[0] else "str"
        if event.tag is not None:
            self._problem(path, line, f"the key {text!r} has a tag", "leave it out", "tag")
        elif kind == "merge":
            what = "the merge key << is not read in presets"
            remedy = "use 'extends', or an interpolation such as ${schemes.NAME}"
            self._problem(path, line, what, remedy, "merge-key")
        elif kind != "str":
            what = f"the key {text or 'null'} is a YAML {kind} (expected text)"
            self._problem(path, line, what, f"write '\"{text}\"'", "key")
        return text

    def _scalar(self, event: yaml.ScalarEvent, path: Path) -> Scalar:
        value: Scalar = event.value
        try:
            # JSON writes a character above U+FFFF as the two halves that UTF-16 has
            value = event.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            what = f"{event.value!r} has half of a character in it"
            self.document.report(path, what, "write the character itself", "encoding")
            return None
        try:
            if event.tag is None and event.implicit[0]:
                value = self._plain(event.value)
        except RefusedError as error:
            self.document.report(path, *error.args)
        return _checked(self.document, path, value)

    def _old_type(self, text: str) -> str:
        """What YAML 1.1 takes an unquoted scalar for: `str`, `bool`, `int`, …"""
        return str(self.loader.resolve(yaml.ScalarNode, text, (True, False))).removeprefix(_TAG)

    def _plain(self, text: str) -> Scalar:
        """The value of an unquoted scalar; refused where YAML 1.1 and YAML 1.2 disagree."""
        kind = self._old_type(text)
        if len(text) > MAX_DIGITS and (kind == "int" or re.fullmatch("0o[0-7]+", text)):
            what = f"{text[:20]}… has more than {MAX_DIGITS} digits"
            raise RefusedError(what, "write a smaller number", "yaml-1.1")
        new = next((make(text) for known, make in _CORE if re.fullmatch(known, text)), text)
        try:
            old = self.loader.construct_object(yaml.ScalarNode(f"{_TAG}{kind}", text))
        except (ValueError, OverflowError, yaml.YAMLError):  # such as 0x_, or 2024-13-01
            old = None if new is not None else text
        shown = text if len(text) < 40 else f"{text[:20]}…"
        quoted = f"'\"{shown}\"'"
        if isinstance(old, float) and not math.isfinite(old):
            what = f"{shown} is not a plain decimal number"
            raise RefusedError(what, f"write it as in 0.5, or {quoted}", "yaml-1.1")
        if type(old) is type(new) and old == new:
            return new
        what = f"{shown} is {_name(old)} in YAML 1.1 and {_name(new)} in YAML 1.2"
        plain = [_name(value) for value in (old, new) if isinstance(value, bool | int | float)]
        raise RefusedError(what, f"write {' or '.join([*plain[:1], quoted])}", "yaml-1.1")

    def _line(self) -> int:
        return int(self.loader.peek_event().start_mark.line) + 1

    def _place(self, path: Path, line: int) -> Location:
        return dataclasses.replace(self.document.locate(path), line=line if self.is_file else 0)

    def _problem(self, path: Path, line: int, what: str, remedy: str, rule: str) -> None:
        self.document.findings.add(self._place(path, line), what, remedy, rule)
        self.document.mark(path)

    def _report_syntax(self, error: yaml.MarkedYAMLError) -> None:
        mark = error.problem_mark or error.context_mark
        assert mark is not None
        source = (mark.get_snippet(0, MAX_FILE_BYTES) or "").partition("\n")[0]
        what, remedy = _in_words(error)
        if "\t" in source[: len(source) - len(source.lstrip())] or "'\\t'" in what:
            remedy = "indent with spaces, not tabs"
        elif "${" in source:
            remedy = 'within { } or [ ] put interpolations in quotes: "${schemes.NAME}"'
        elif _UNQUOTED_GLOB.search(source):
            remedy = 'put patterns in quotes: match: "*.q_proj"'
        self._problem((), mark.line + 1, f"is not YAML: {what}", remedy, "syntax")


def _in_words(error: yaml.MarkedYAMLError) -> tuple[str, str]:
    """What PyYAML found in the words of who writes YAML, and what helps."""
    problem = str(error.problem or error.context)
    opened = f" of line {error.context_mark.line + 1}" if error.context_mark else ""
    if problem.startswith("expected <block end>"):
        what = f"this line is not indented as the mapping or list{opened} is"
        return what, "begin all its keys, or all its dashes, in one column"
    if "<stream end>" in problem and problem.startswith("expected ','"):
        return f"the brackets{opened} are not closed", "add what closes them"
    if problem.startswith("expected ','"):
        closing = problem.partition(" or ")[2][:3]
        return f"a ',' or {closing} is missing before this", ""
    if problem == "mapping values are not allowed here":
        return "a ':' stands where no key can be", "indent the keys of a mapping alike"
    if problem.startswith("found unexpected end of stream"):
        return f"the quotes{opened} are not closed", "add what closes them"
    return problem, ""


def _name(value: object) -> str:
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return {str: "text", datetime.date: "a date"}.get(type(value), "special")


def _line_of(before: str) -> int:
    """The line of what stands behind some text."""
    return len(f"{before}x".splitlines())


def _kind(data: Any) -> str:
    kinds: dict[type, str] = {dict: "a mapping", list: "a list"}
    return kinds.get(type(data)) or repr(data)
