"""One safetensors file, written layer by layer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.compose.stream import compose_layer
from mixedprec_plugin.convert.form import Form
from mixedprec_plugin.convert.parts import Part, PlacedTensor, tensor_name
from mixedprec_plugin.convert.provenance import layer_provenance
from mixedprec_plugin.plan.model import Plan

if TYPE_CHECKING:
    from typing_extensions import Buffer

_CHUNK = 1 << 20

Progress = Callable[[int], None]


class HashingReader(Reader):
    """Reads tensors and keeps the SHA-256 of what it read.

    Attributes:
        digests: stored tensor -> digest of its bytes, since they were last taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.digests: dict[StoredTensor, str] = {}

    def __enter__(self) -> HashingReader:
        return self

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """Read one tensor; see `Reader.read`."""
        value = super().read(tensor)
        self.digests[tensor] = hashlib.sha256(_view(value)).hexdigest()
        return value

    def take_digests(self) -> dict[StoredTensor, str]:
        """The digests so far; they are forgotten here."""
        digests, self.digests = self.digests, {}
        return digests


def write_part(
    part: Part, plan: Plan, form: Form, path: Path, reader: HashingReader, progress: Progress
) -> list[dict[str, Any]]:
    """Write one file, with one layer in memory at a time, and see it to the disk.

    Args:
        path: the file, overwritten if it is there.
        progress: called with the number of bytes after each tensor.
    Returns:
        the provenance of its layers.
    Raises:
        OSError: the file cannot be written.
        CheckpointError, ShapeError: a source is damaged.
    """
    provenance = []
    descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    try:
        _write(descriptor, part.header, 0)
        for layer in part.layers:
            tensors = form.tensors(layer, compose_layer(layer, plan.target, reader))
            for suffix, tensor in tensors.items():
                place = part.tensors[tensor_name(layer.name, suffix)]
                _write_tensor(descriptor, tensor, place, len(part.header))
                progress(place.num_bytes)
            provenance.append(layer_provenance(layer, plan, reader.take_digests()))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return provenance


def _write_tensor(
    descriptor: int, tensor: torch.Tensor, place: PlacedTensor, data_start: int
) -> None:
    data = _view(tensor)
    assert data.nbytes == place.num_bytes, (place, tensor.dtype, tensor.shape)
    _write(descriptor, data, data_start + place.start)


def _view(tensor: torch.Tensor) -> memoryview:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return memoryview(cast("Buffer", flat.numpy()))


def _write(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < view.nbytes:
        done += os.pwrite(descriptor, view[done:], offset + done)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Write a small file and see it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def weight_map(parts: tuple[Part, ...]) -> Mapping[str, str]:
    """Tensor name -> file."""
    return {name: part.file for part in parts for name in part.tensors}
