"""The output folder: what is in it, and how finished files get there.

Files are written in a folder of their own inside it and renamed into place when all are finished,
config.json last: whatever lacks a config.json is no checkpoint, for us, SGLang and transformers.
Links in it are not ours, and are neither followed nor published.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

from mixedprec_plugin.checkpoint.recorded import (
    FILE_NAME,
    PROVENANCE_NAME,
    parse_record,
    read_chunks,
)
from mixedprec_plugin.errors import ConvertError, Problem
from mixedprec_plugin.plan.model import Plan

WORK_NAME = ".mixedprec-partial"
CONFIG_NAME = "config.json"
JOURNAL_NAME = "journal.jsonl"
_STALE_NAME = "stale.json"
# small files and copies of the model's, in the work folder
_STAGED_NAME = "files"
# no folder can be where it is asked for
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
# what file systems put into a fresh mount
_NOT_OURS = frozenset({"lost+found"})

_NAMES = {"type": "array", "items": FILE_NAME}
_REPLACED = {"type": "object", "required": ["files"], "properties": {"files": _NAMES}}

State = Literal["empty", "partial", "complete", "foreign"]


def state_of(out: Path) -> State:
    """Tell what an output folder holds."""
    if not out.exists():
        return "empty"
    names = {path.name for path in out.iterdir()} - _NOT_OURS
    if WORK_NAME in names:
        return "partial"
    if CONFIG_NAME in names and PROVENANCE_NAME in names:
        return "complete"
    return "foreign" if names else "empty"


def check_apart(out: Path, plan: Plan) -> None:
    """Refuse an output folder that is, holds or lies in one of the sources.

    Raises:
        ConvertError: it does.
    """
    own = _with_parents(out)
    for name, source in plan.sources.items():
        theirs = _with_parents(source.path)
        if theirs[0] in own or own[0] in theirs:
            text = f"is, contains or is inside the source {name!r} ({source.path})"
            raise ConvertError(Problem(str(out), text, "name a folder elsewhere", "out-in-source"))


def _with_parents(folder: Path) -> list[object]:
    """What tells a folder and each one around it from others, by whatever path it is reached."""
    # realpath takes links that go in a circle, which resolve does not
    path = Path(os.path.realpath(folder))
    found: list[object] = []
    for each in (path, *path.parents):
        try:
            how = each.stat()
            found.append((how.st_dev, how.st_ino))
        except OSError:
            found.append(each)
    return found


def open_work(out: Path) -> Path:
    """Make the folder of an unfinished conversion, or find it.

    Raises:
        ConvertError: something in it is a link, also a hard one, or a pipe.
    """
    work = out / WORK_NAME
    if not work.is_symlink():
        work.mkdir(parents=True, exist_ok=True)
    for path in (work, *work.rglob("*")):
        try:
            how = path.lstat()
        except FileNotFoundError:  # another process finished it
            continue
        if not (stat.S_ISDIR(how.st_mode) or (stat.S_ISREG(how.st_mode) and how.st_nlink == 1)):
            text = "is a link or no file (expected what a conversion wrote)"
            raise ConvertError(Problem(str(path), text, "remove it", "out-link"))
    return work


def empty_work(work: Path) -> None:
    """Forget all parts of an unfinished conversion; what an older output left stays to be done."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (JOURNAL_NAME, _STALE_NAME):
            path.unlink()


def record(path: Path, schema: Mapping[str, Any]) -> Any:
    """Read a record of an earlier conversion.

    Raises:
        ConvertError: it is damaged, or there is none.
    """
    try:
        # a pipe would be waited for
        return parse_record(path.read_bytes() if path.is_file() else b"", schema)
    except (ValueError, OSError) as error:
        remedy = "name another folder"
        raise ConvertError(Problem(str(path), str(error), remedy, "record")) from error


def find_part(out: Path, file: str) -> Path | None:
    """A part, being worked on or already renamed into place; None where there is neither."""
    work = out / WORK_NAME
    is_publishing = not (out / CONFIG_NAME).exists() and not (work / _STALE_NAME).exists()
    places = [work / file, out / file] if is_publishing else [work / file]
    return next((path for path in places if path.is_file() and not path.is_symlink()), None)


def is_replaced(out: Path) -> bool:
    """Whether an older output is being taken away."""
    return (out / WORK_NAME / _STALE_NAME).exists()


def create(path: Path) -> BinaryIO:
    """Open a new file in the place of whatever was there; a link there is not followed."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def copy_staged(out: Path, files: Iterable[Path]) -> dict[str, str]:
    """Copy files of the model to where they wait for being published.

    Returns:
        name -> SHA-256 of what was copied.
    Raises:
        CheckpointError: one cannot be read.
        OSError: one cannot be written.
    """
    staged = out / WORK_NAME / _STAGED_NAME
    if staged.exists():
        shutil.rmtree(staged)
    staged.mkdir()
    return {path.name: _write(staged / path.name, read_chunks(path)) for path in files}


def publish(out: Path, written: Mapping[str, bytes]) -> None:
    """Put everything into place and clean up; can be repeated wherever it was stopped.

    Args:
        written: small files -> content, in order; config.json is the last.
    """
    work = out / WORK_NAME
    _remove_stale(out, work)
    for path in sorted((*work.glob("*.safetensors"), *(work / _STAGED_NAME).iterdir())):
        path.rename(out / path.name)
    # the parts' names must be on disk before config.json makes a checkpoint of them
    _sync(out)
    for name, content in written.items():
        staged = work / _STAGED_NAME / name
        _write(staged, [content])
        staged.rename(out / name)
        _sync(out)
    clear_work(out)


def _remove_stale(out: Path, work: Path) -> None:
    """Take away the output that is being replaced, its config.json first."""
    listed = work / _STALE_NAME
    if (out / CONFIG_NAME).exists() and not listed.exists():
        old = record(out / PROVENANCE_NAME, _REPLACED)
        names = [CONFIG_NAME, *old["files"], PROVENANCE_NAME]
        _write(work / f"{_STALE_NAME}.tmp", [json.dumps(names).encode()])
        (work / f"{_STALE_NAME}.tmp").rename(listed)
        _sync(work)
    if listed.exists():
        for name in record(listed, _NAMES):
            (out / name).unlink(missing_ok=True)
            _sync(out)
        listed.unlink()


def _write(path: Path, content: Iterable[bytes]) -> str:
    """Write a file and see it to the disk; return its SHA-256."""
    digest = hashlib.sha256()
    with create(path) as file:
        for chunk in content:
            digest.update(chunk)
            if chunk.count(0) < len(chunk):
                file.write(chunk)
            else:  # of nothing but zeros a hole is enough
                file.seek(len(chunk), os.SEEK_CUR)
        file.truncate()
        os.fsync(file.fileno())
    return digest.hexdigest()


def clear_work(out: Path) -> None:
    """Remove the folder of a finished or given-up conversion, its journal first."""
    work = out / WORK_NAME
    (work / JOURNAL_NAME).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    _sync(out)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(out: Path, num_bytes: int) -> None:
    """Check before the work that the disk holds what is to be written.

    Raises:
        ConvertError: it does not.
    """
    free = shutil.disk_usage(out).free
    if num_bytes > free:
        text = f"has {free:,} bytes free (expected {num_bytes:,})"
        raise ConvertError(Problem(str(out), text, "free some, or name another disk", "disk-full"))


@contextlib.contextmanager
def write_errors(out: Path) -> Iterator[None]:
    """Say where it was and what to do when a file cannot be written."""
    try:
        yield
    except OSError as error:
        where, what = str(error.filename or out), f"cannot be written ({error.strerror})"
        remedy = "make room or access, and run the same command again: it continues"
        if error.errno in _NO_FOLDER:
            remedy = "name another folder"
        raise ConvertError(Problem(where, what, remedy, "write")) from error
