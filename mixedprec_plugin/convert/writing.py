"""One safetensors file, written layer by layer.

The library's serializer wants all tensors of a file in memory at once. A part of 5 GB is written
with one layer there, so its bytes go to where the header, which is planned, says that they lie; in
the end the library reads the header.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixedprec_plugin.checkpoint.headers import open_tensors
from mixedprec_plugin.compose.stream import Compose
from mixedprec_plugin.convert.folder import create
from mixedprec_plugin.convert.form import Form
from mixedprec_plugin.convert.parts import Part
from mixedprec_plugin.convert.provenance import HashingReader, bytes_of, layer_provenance
from mixedprec_plugin.plan.model import Plan


def write_part(
    part: Part,
    plan: Plan,
    form: Form,
    path: Path,
    advance: Callable[[int], None],
    compose: Compose,
) -> list[dict[str, Any]]:
    """Write one file, with one layer in memory at a time, and see it to the disk.

    Args:
        advance: called with the number of bytes after each tensor.
    Returns:
        the provenance of its layers.
    Raises:
        OSError: the file cannot be written.
        CheckpointError, ShapeError: a source is damaged.
    """
    provenance = []
    with create(path) as file, HashingReader() as reader:
        file.write(part.header)
        for layer in part.layers:
            tensors = form.tensors(layer, compose(layer, plan.target, reader))
            for suffix, tensor in tensors.items():
                place, data = part.tensors[layer.tensor_name(suffix)], bytes_of(tensor)
                assert data.nbytes == place.spec.num_bytes, (place, tensor.dtype, tensor.shape)
                file.seek(len(part.header) + place.start)
                file.write(data)
                advance(data.nbytes)
            provenance.append(layer_provenance(layer, reader.take_digests()))
        file.flush()
        os.fsync(file.fileno())
    with open_tensors(path, "numpy"):
        pass
    return provenance
