"""What `mixedprec convert` recorded of its files, held against them where they are read.

    mixedprec_provenance.json: {"parts": {FILE: {"bytes": …, "sha256": …, "header_sha256": …}}, …}

The size and the header of each file are looked at whenever the folder is opened, all of its bytes
where that is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mixedprec_plugin.checkpoint.files import file_error, open_plain
from mixedprec_plugin.checkpoint.headers import CHANGED
from mixedprec_plugin.checkpoint.hub import fetch_if_missing, is_remote
from mixedprec_plugin.errors import Problem

PROVENANCE_NAME = "mixedprec_provenance.json"
CALIBRATION_NAME = "mixedprec_calibration.json"

_CHUNK = 1 << 20
# of the safetensors library
_LONGEST_HEADER = 100_000_000
SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
# of a file in the folder itself
FILE_NAME = {"type": "string", "pattern": r"^(?!\.{1,2}$)[^/\x00]+$"}
_PART = {
    "type": "object",
    "required": ["bytes", "sha256"],
    "properties": {
        "bytes": {"type": "integer", "minimum": 0}, "sha256": SHA256, "header_sha256": SHA256,
    },
}  # fmt: skip
_RECORDED = {
    "type": "object",
    "required": ["parts"],
    "properties": {
        "parts": {"type": "object", "propertyNames": FILE_NAME, "additionalProperties": _PART}
    },
}
_REMEDY = f"convert or copy it again; if the change was meant, remove {PROVENANCE_NAME}"


def parse_record(text: bytes, schema: Mapping[str, Any]) -> Any:
    """Read a record of ours.

    Raises:
        ValueError: it is none, with what is wrong in few words.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    try:
        value = json.loads(text)
        found = best_match(Draft202012Validator(schema).iter_errors(value))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    if found:
        raise ValueError(f"is none of ours ({found.json_path}: {found.message[:200]})")
    return value


def damage(folder: Path, *, digests: bool = False) -> list[Problem]:
    """Say which files of a converted checkpoint are not what was written.

    Args:
        folder: of any checkpoint; of others there is nothing to say.
        digests: whether to read every byte, and not only sizes and headers.
    Raises:
        CheckpointError: the record is damaged, or a file cannot be read.
    """
    path = folder / PROVENANCE_NAME
    if not path.is_file():
        return []
    try:
        parts = parse_record(b"".join(read_chunks(path)), _RECORDED)["parts"]
    except ValueError as error:
        raise file_error(path, str(error), "remove it, or convert or copy all again") from error
    problems = []
    for name, said in parts.items():
        with reading(folder / name):
            what = _difference(folder / name, said, digests=digests)
        if what:
            problems.append(Problem(str(folder / name), what, _REMEDY, "recorded"))
    return problems


def _difference(path: Path, said: Mapping[str, Any], *, digests: bool) -> str:
    if is_remote(path):
        if not digests:
            return ""
        fetch_if_missing(path)
    if not path.is_file():
        return f"is missing, which {PROVENANCE_NAME} lists"
    if (size := path.stat().st_size) != said["bytes"]:
        return f"has {size:,} bytes (expected {said['bytes']:,}, as {PROVENANCE_NAME} says)"
    if said.get("header_sha256", "") not in ("", _header_digest(path)):
        return f"has another header than {PROVENANCE_NAME} says"
    if digests and file_digest(path) != said["sha256"]:
        return f"has other bytes than {PROVENANCE_NAME} says"
    return ""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of a file that is read why it cannot be.

    Raises:
        CheckpointError: for whatever the system says of it.
    """
    try:
        yield
    except OSError as error:
        raise file_error(path, f"cannot be read ({error.strerror})", CHANGED) from error


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file that is read, a MiB at a time.

    Raises:
        CheckpointError: it cannot be read.
    """
    with reading(path), open_plain(path) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def digest_of(value: Any) -> str:
    """SHA-256 of plain data, the same for mappings whose keys stand in another order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _header_digest(path: Path) -> str:
    """SHA-256 of a safetensors file up to its first tensor."""
    with path.open("rb") as file:
        length = file.read(8)
        num_bytes = min(int.from_bytes(length, "little"), _LONGEST_HEADER)
        return hashlib.sha256(length + file.read(num_bytes)).hexdigest()
