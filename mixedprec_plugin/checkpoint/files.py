"""Files of a checkpoint, which may be anybody's: plain files alone, within bounds.

A pipe would keep a reader waiting, a device has no end, and a link may lead to any file there is.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from mixedprec_plugin.errors import CheckpointError, Problem

# the index of a model of 100,000 experts' projections has 10 MiB
MAX_BYTES = 64 << 20
# what is written takes up to 200 bytes of memory for each of these characters
_MAX_VALUES = 2_000_000
_MAX_DEPTH = 32


def file_error(path: Path, what: str, remedy: str = "download the file again") -> CheckpointError:
    """The error of a file that is not what it should be."""
    return CheckpointError(Problem(str(path), what, remedy, "file"))


def open_plain(path: Path) -> BufferedReader:
    """Open a plain file to read it.

    Raises:
        OSError: it cannot be opened, or is a pipe, a device or a folder; said at once.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)

    file = open(path, "rb", opener=opener)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "no plain file")
    return file


def file_remedy(error: OSError) -> str:
    """What helps where a file cannot be opened."""
    if isinstance(error, PermissionError):
        return "check its permissions"
    return "download it" if isinstance(error, FileNotFoundError) else "download the file again"


def check_not_pointer(data: bytes, path: Path) -> None:
    """Refuse what stands in a clone for a file of Git LFS.

    Source: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md.
    Raises:
        CheckpointError: it is such a pointer.
    """
    if data.startswith(b"version https://git-lfs.github.com/"):
        what = "is a Git LFS pointer, not the file itself"
        command = f"git -C {shlex.quote(str(path.parent))} lfs pull"
        raise file_error(path, what, f"fetch it with '{command}', or download the file")


def check_place(path: Path) -> None:
    """Refuse a link out of its folder, but for one into the Hub's cache.

    That keeps files in `blobs`, by the digest of their content: who links there knows it.

    Raises:
        CheckpointError: it is one.
    """
    if not os.path.islink(path) or not os.path.exists(path):
        return
    target = Path(os.path.realpath(path))
    blobs, repository = target.parent, target.parent.parent
    is_cache = repository.name.startswith("models--") or (repository / "snapshots").is_dir()
    is_cached = blobs.name == "blobs" and is_cache
    if not is_cached and not target.is_relative_to(os.path.realpath(path.parent)):
        what = f"is a link out of its folder, to {str(target)!r}"
        command = shlex.join(["cp", "--remove-destination", str(target), str(path)])
        raise file_error(path, what, f"copy the file: {command}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: it cannot be read, is none, or is larger than any that tools write.
    """
    check_place(path)
    try:
        with open_plain(path) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise file_error(path, what, file_remedy(error)) from error
    check_size(data, path)
    check_not_pointer(data, path)
    if data.startswith((b"\xef\xbb\xbf", b"\xfe\xff", b"\xff\xfe")):
        what = "starts with a byte order mark, which transformers and SGLang do not read"
        raise file_error(path, what, "save it as UTF-8 without one")
    try:
        text = data.decode()
        value = json.loads(text)
        if "\\u" in text:  # halves of characters are no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise file_error(path, f"is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise file_error(path, "is not a JSON object", remedy="")
    if _is_deep(value):
        raise file_error(path, f"is nested more than {_MAX_DEPTH} deep")
    return value


def check_size(data: bytes, path: Path) -> None:
    """Refuse JSON that would take more memory than any record of a checkpoint needs.

    Raises:
        CheckpointError: it is too large.
    """
    if len(data) > MAX_BYTES or sum(map(data.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        limits = f"{MAX_BYTES:,} bytes of JSON and {_MAX_VALUES:,} values"
        raise file_error(path, f"is larger than any record (expected {limits} at most)")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            part
            for whole in level
            if isinstance(whole, dict | list)
            for part in (whole.values() if isinstance(whole, dict) else whole)
        ]
    return bool(level)
