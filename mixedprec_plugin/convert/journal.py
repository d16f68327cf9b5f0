"""The parts of a conversion that are finished, in a file that a kill cannot spoil."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from mixedprec_plugin.checkpoint.recorded import SHA256, parse_record
from mixedprec_plugin.convert.folder import JOURNAL_NAME
from mixedprec_plugin.convert.inputs import INPUTS
from mixedprec_plugin.convert.provenance import LAYERS
from mixedprec_plugin.errors import ConvertError, Problem

_PART = {"file": {"type": "string"}, "sha256": SHA256, "provenance": LAYERS}
_LINE = {
    "type": "object",
    "oneOf": [
        {"required": [*each], "properties": each, "additionalProperties": False}
        for each in ({"inputs": INPUTS}, _PART)
    ],
}


@dataclasses.dataclass(frozen=True)
class FinishedPart:
    """A part that was written, with the proof of it."""

    file: str
    sha256: str
    provenance: list[dict[str, Any]]


class Journal:
    """One line for the inputs, then one for each finished part; each is on disk when it counts.

    Only one process can hold it open.

    Attributes:
        damage: what is wrong with the file; empty where it is as it was written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_NAME
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            text = "another process is converting into this folder"
            raise ConvertError(Problem(str(folder.parent), text, "wait for it", "busy")) from error
        self.inputs: dict[str, str] = {}
        self.finished: dict[str, FinishedPart] = {}
        self.damage = ""
        try:
            self._read()
        except ValueError as error:
            self.damage = str(error)

    def close(self) -> None:
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        for line in lines:
            entry = parse_record(line, _LINE)
            if "inputs" in entry:
                self.inputs = entry["inputs"]
            else:
                part = FinishedPart(**entry)
                self.finished[part.file] = part
        if torn:
            # a kill left it without its end
            self._file.truncate(sum(len(line) + 1 for line in lines))

    def start(self, inputs: dict[str, str]) -> None:
        self._file.truncate(0)
        self.inputs, self.finished = inputs, {}
        self._append({"inputs": inputs})

    def finish(self, part: FinishedPart) -> None:
        self._append(dataclasses.asdict(part))
        self.finished[part.file] = part

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
