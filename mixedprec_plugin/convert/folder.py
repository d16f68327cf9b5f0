"""The output folder: what is in it, and how finished files get there.

Files are written in a folder of their own inside it and renamed into place when all are finished,
config.json last: whatever lacks a config.json is no checkpoint, for us, SGLang and transformers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mixedprec_plugin.convert.journal import JOURNAL_NAME
from mixedprec_plugin.convert.provenance import PROVENANCE_NAME
from mixedprec_plugin.convert.writing import write_file
from mixedprec_plugin.errors import ConvertError, Problem
from mixedprec_plugin.plan.model import Plan

WORK_NAME = ".mixedprec-partial"
CONFIG_NAME = "config.json"
_STALE_NAME = "stale.json"
# what file systems put into a fresh mount
_NOT_OURS = frozenset({"lost+found"})
# a model's files that say nothing of its weights are copied; these do, or are weights
_LEFT_OUT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt"}
)
_LEFT_OUT_NAMES = frozenset(
    {
        CONFIG_NAME, "quantize_config.json", "quantization_config.json", "quant_config.json",
        "hf_quant_config.json", PROVENANCE_NAME,
    }
)  # fmt: skip

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
    own = out.resolve()
    for name, source in plan.sources.items():
        folder = source.path.resolve()
        if own == folder or folder in own.parents or own in folder.parents:
            text = f"is, holds or lies in the source {name!r} ({source.path})"
            raise ConvertError(Problem(str(out), text, "name a folder elsewhere", "out-in-source"))


def recorded_inputs(out: Path) -> dict[str, str]:
    """What a complete output says that it was made of."""
    try:
        inputs: dict[str, str] = json.loads((out / PROVENANCE_NAME).read_text())["inputs"]
    except (ValueError, KeyError, TypeError) as error:
        text = "is damaged"
        raise ConvertError(
            Problem(str(out / PROVENANCE_NAME), text, "name another folder", "provenance")
        ) from error
    return inputs


def is_published(out: Path, inputs: dict[str, str]) -> bool:
    """Whether all of these inputs' output is in place, and only the cleaning up was stopped."""
    if not (out / CONFIG_NAME).exists() or (out / WORK_NAME / _STALE_NAME).exists():
        return False
    return recorded_inputs(out) == inputs


def copied_files(model: Path) -> list[Path]:
    """The model's files that go with any weights: tokenizer, templates, code, licence."""
    return [
        path
        for path in sorted(model.iterdir())
        if path.is_file()
        and path.suffix not in _LEFT_OUT_SUFFIXES
        and path.name not in _LEFT_OUT_NAMES
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
    ]


def find_part(out: Path, file: str) -> Path | None:
    """A part, being worked on or already renamed into place; None where there is neither."""
    work = out / WORK_NAME
    if (work / file).is_file():
        return work / file
    is_publishing = not (out / CONFIG_NAME).exists() and not (work / _STALE_NAME).exists()
    return out / file if is_publishing and (out / file).is_file() else None


def publish(out: Path, written: Mapping[str, bytes], copied: Iterable[Path]) -> None:
    """Put everything into place and clean up; can be repeated wherever it was stopped.

    Args:
        written: small files -> content, in order; config.json is the last.
        copied: files of the model.
    """
    work = out / WORK_NAME
    _remove_stale(out, work)
    for path in sorted(work.glob("*.safetensors")):
        path.rename(out / path.name)
    for path in copied:
        _place(out, path.name, path.read_bytes())
    # the parts' names must be on disk before config.json makes a checkpoint of them
    _sync(out)
    for name, content in written.items():
        _place(out, name, content)
        _sync(out)
    clear_work(out)


def _remove_stale(out: Path, work: Path) -> None:
    """Take away the output that is being replaced, its config.json first."""
    listed = work / _STALE_NAME
    if (out / CONFIG_NAME).exists() and not listed.exists():
        old: dict[str, Any] = json.loads((out / PROVENANCE_NAME).read_text())
        names = [CONFIG_NAME, *old["files"], PROVENANCE_NAME]
        write_file(work / f"{_STALE_NAME}.tmp", json.dumps(names).encode())
        (work / f"{_STALE_NAME}.tmp").rename(listed)
        _sync(work)
    if listed.exists():
        for name in json.loads(listed.read_text()):
            (out / Path(name).name).unlink(missing_ok=True)
            _sync(out)
        listed.unlink()


def _place(out: Path, name: str, content: bytes) -> None:
    temporary = out / WORK_NAME / f"{name}.tmp"
    write_file(temporary, content)
    temporary.rename(out / name)


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
        where = str(error.filename or out)
        raise ConvertError(
            Problem(
                where,
                f"cannot be written ({error.strerror})",
                "make room or access, and run the same command again: it continues",
                "write",
            )
        ) from error
