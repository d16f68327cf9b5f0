"""One safetensors file, written layer by layer.

The library's serializer wants all tensors of a file in memory at once. A part of 5 GB is written
with one layer there, so its bytes go to where the header, which is planned, says that they lie; in
the end the library reads the header.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from mixedprec_plugin.checkpoint.headers import StoredTensor, read_header
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.compose.stream import compose_layer
from mixedprec_plugin.convert.form import Form
from mixedprec_plugin.convert.parts import Part, tensor_name
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
    with path.open("wb") as file:
        file.write(part.header)
        for layer in part.layers:
            tensors = form.tensors(layer, compose_layer(layer, plan.target, reader))
            for suffix, tensor in tensors.items():
                place, data = part.tensors[tensor_name(layer.name, suffix)], _view(tensor)
                assert data.nbytes == place.num_bytes, (place, tensor.dtype, tensor.shape)
                file.seek(len(part.header) + place.start)
                file.write(data)
                progress(place.num_bytes)
            provenance.append(layer_provenance(layer, plan, reader.take_digests()))
        file.flush()
        os.fsync(file.fileno())
    read_header(path)
    return provenance


def _view(tensor: torch.Tensor) -> memoryview:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return memoryview(cast("Buffer", flat.numpy()))


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
