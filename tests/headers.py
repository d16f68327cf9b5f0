"""Checkpoints of nothing but headers: real safetensors files whose weights are a hole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Header = Mapping[str, tuple[str, tuple[int, ...]]]

_BITS = {
    "BF16": 16, "F16": 16, "F32": 32, "F8_E4M3": 8, "I8": 8, "I32": 32, "F4": 4, "F6_E2M3": 6,
    "F8_E4M3FNUZ": 8, "F8_E8M0": 8, "C64": 64, "U8": 8, "U16": 16,
}  # fmt: skip


def write_headers(folder: Path, config: Mapping[str, Any], tensors: Header, parts: int = 1) -> Path:
    """Write config.json, an index, and sparse files with the given headers.

    Args:
        folder: made where it is not there.
        config: config.json.
        tensors: tensor name -> dtype and shape.
        parts: number of files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    items = list(tensors.items())
    size = -(-len(items) // parts)
    weight_map: dict[str, str] = {}
    for start in range(0, len(items), size):
        name = f"model-{start // size + 1:05d}-of-{parts:05d}.safetensors"
        part = dict(items[start : start + size])
        _write_file(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _write_file(path: Path, tensors: Header) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * _BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
