"""Layers that were quantized or repacked at load, kept on disk for the next start.

An entry is a safetensors file, named by a digest of all that decides what is in it: the files that
the layer was read from, its scheme, the part of it that a rank keeps, and the code. So nothing has
to be invalidated: what changed has another name, and what is no longer asked for is the first to go
where the folder grows beyond its bound. Files appear whole (`os.replace`), whatever happens to the
process that writes them, and processes that write the same one write the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

import mixedprec_plugin
from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.source import Facts
from mixedprec_plugin.resources import cache_root

if TYPE_CHECKING:
    import torch

# of a disk, what is left free; and when what an interrupted write left goes
_FREE_SHARE, _STALE_S = 0.05, 3600.0
_SUFFIX, _UNFINISHED = ".safetensors", ".part"
# what the tensors of a layer are made by
_CODE = ("compose", "methods", "quantize", "families")


def cache_folder() -> Path:
    """Where layers are kept."""
    return cache_root() / "layers"


@dataclasses.dataclass
class LayerCache:
    """The entries of a folder.

    Args:
        max_bytes: what `trim` leaves at most.
        facts: file -> what the file system said of it when its source was opened.

    Attributes:
        num_found, num_kept: entries that were read and written by this one.
        stopped: why nothing more is written; empty as long as something is.
    """

    folder: Path
    max_bytes: int
    facts: Mapping[Path, Facts]
    num_found: int = 0
    num_kept: int = 0
    stopped: str = ""

    def key(self, tensors: Iterable[StoredTensor], **decisive: object) -> str | None:
        """The name of an entry.

        Args:
            decisive: what else decides, as JSON holds it.
        Returns:
            None where a file is not known well enough, as one that is still to be downloaded.
        """
        read: list[Any] = []
        for tensor in tensors:
            facts = self.facts.get(tensor.path)
            if facts is None:
                return None
            file = os.path.realpath(tensor.path), *facts
            read.append((file, tensor.name, tensor.dtype, tensor.shape, tensor.start))
        text = json.dumps([_code_digest(), read, decisive], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """Read an entry, mapped; None where there is none, or it is damaged."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            os.utime(path)
        except (OSError, SafetensorError):
            return None
        self.num_found += 1
        return found

    def put(self, key: str, tensors: Mapping[str, torch.Tensor], **told: str) -> None:
        """Keep an entry; where the disk has no room, say so in `stopped` and keep no more.

        Args:
            told: what `entries` tells of it.
        """
        from safetensors.torch import save_file

        if self.stopped:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            usage = shutil.disk_usage(path.parent)
            if usage.free < _FREE_SHARE * usage.total:
                self.stopped = f"less than {_FREE_SHARE:.0%} of the disk is free"
                return
            handle, name = tempfile.mkstemp(dir=path.parent, suffix=_UNFINISHED)
            os.close(handle)
            try:
                save_file({s: t.contiguous() for s, t in tensors.items()}, name, told)
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
        except (OSError, SafetensorError) as error:
            self.stopped = str(error)
            return
        self.num_kept += 1

    def trim(self) -> None:
        """Delete what was used longest ago until the rest is within the bound.

        Of several processes one does it, and the others pass it by.
        """
        if not self.folder.is_dir():
            return
        with contextlib.suppress(BlockingIOError), open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _trim(self.folder, self.max_bytes)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{_SUFFIX}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One layer, or a rank's part of one.

    Attributes:
        used: when it was written or read last, in seconds since the epoch.
        told: `model`, `layer` and `scheme`.
    """

    path: Path
    num_bytes: int
    used: float
    told: Mapping[str, str]


def entries(folder: Path) -> Iterator[Entry]:
    """What a folder keeps."""
    for path, size, used in _files(folder):
        if path.suffix == _SUFFIX:
            with contextlib.suppress(OSError, SafetensorError), safe_open(path, "numpy") as file:
                yield Entry(path, size, used, file.metadata() or {})


def clear(folder: Path) -> int:
    """Delete every entry; return their bytes."""
    return _trim(folder, 0, stale_s=0.0)


def _trim(folder: Path, max_bytes: int, stale_s: float = _STALE_S) -> int:
    deleted = 0
    files = sorted(_files(folder), key=lambda file: file[2], reverse=True)
    ages = itertools.accumulate(size for _, size, _ in files)
    for (path, size, used), until in zip(files, ages, strict=True):
        is_stale = path.suffix == _UNFINISHED and time.time() - used > stale_s
        if is_stale or (path.suffix == _SUFFIX and until > max_bytes):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                deleted += size
    return deleted


def _files(folder: Path) -> Iterator[tuple[Path, int, float]]:
    for path in folder.glob("??/*"):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            yield path, stat.st_size, stat.st_mtime


@functools.cache
def _code_digest() -> str:
    """A digest of the code that makes tensors, and of torch's release."""
    digest = hashlib.sha256(importlib.metadata.version("torch").encode())
    root = Path(mixedprec_plugin.__file__).parent
    for room in _CODE:
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
