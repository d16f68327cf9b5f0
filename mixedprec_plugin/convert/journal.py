"""The parts of a conversion that are finished, in a file that a kill cannot spoil."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from mixedprec_plugin.errors import ConvertError, Problem

JOURNAL_NAME = "journal.jsonl"


@dataclasses.dataclass(frozen=True)
class FinishedPart:
    """A part that was written, with the proof of it.

    Attributes:
        provenance: of its layers.
    """

    file: str
    num_bytes: int
    sha256: str
    provenance: list[dict[str, Any]]


class Journal:
    """One line for the inputs, then one for each finished part; each is on disk when it counts.

    Only one process can hold it open.
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
        self._read()

    def close(self) -> None:
        """Let other processes have it."""
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        for line in self._file.read().split(b"\n")[:-1]:
            entry = json.loads(line)
            if "inputs" in entry:
                self.inputs = entry["inputs"]
            else:
                part = FinishedPart(**entry)
                self.finished[part.file] = part
        self._drop_torn_line()

    def _drop_torn_line(self) -> None:
        """Cut off a line that a kill left without its end."""
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)

    def start(self, inputs: dict[str, str]) -> None:
        """Forget all and begin for these inputs."""
        self._file.truncate(0)
        self.inputs, self.finished = inputs, {}
        self._append({"inputs": inputs})

    def finish(self, part: FinishedPart) -> None:
        """Note a part as finished."""
        self._append(dataclasses.asdict(part))
        self.finished[part.file] = part

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
