"""Which tensor lies where in which file: planned from headers, so always the same."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence

from mixedprec_plugin.checkpoint.headers import DTYPE_BITS
from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.methods.stored import TensorSpec
from mixedprec_plugin.plan.model import PlannedLayer

_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
# of a file at most, where nobody says how much
SHARD_SIZE = "5GB"
# every dtype's size divides it: libraries view a tensor's bytes in place
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class PlacedTensor:
    """One tensor of a part.

    Attributes:
        start: offset of its first byte after the header.
    """

    spec: TensorSpec
    start: int


@dataclasses.dataclass(frozen=True)
class Part:
    """One safetensors file.

    Attributes:
        tensors: tensor name -> its place.
        header: the file's first bytes.
    """

    file: str
    layers: tuple[PlannedLayer, ...]
    tensors: Mapping[str, PlacedTensor]
    header: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(tensor.spec.num_bytes for tensor in self.tensors.values())


def parse_size(text: str, flag: str = "--max-shard-size") -> int:
    """Read a size: `5GB`, `500MB` or `4GiB`.

    Raises:
        UsageError: it is none, has no unit, or is less than one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match.group(2).upper()) if match else None
    size = float(match.group(1)) * unit if match and unit else 0
    if match and not match.group(2):
        what = f"{text!r} has no unit (expected one such as {text}GB)"
        raise UsageError(Problem(flag, what))
    if not 1 <= size < math.inf:
        raise UsageError(
            Problem(flag, f"{text!r} is not a size (expected one such as 5GB or 500MB)")
        )
    return int(size)


def plan_parts(
    layers: Sequence[PlannedLayer],
    outputs: Mapping[str, Mapping[str, TensorSpec]],
    max_bytes: int,
) -> tuple[Part, ...]:
    """Distribute layers over files in their order; a layer is never split.

    Args:
        outputs: layer name -> parameter suffix -> what is written.
        max_bytes: most bytes of tensors a file; a layer that is larger has one of its own.
    """
    groups: list[list[PlannedLayer]] = []
    filled = 0
    for layer in layers:
        size = sum(spec.num_bytes for spec in outputs[layer.name].values())
        if not groups or filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(layer)
        filled += size
    names = _file_names(len(groups))
    return tuple(_part(name, group, outputs) for name, group in zip(names, groups, strict=True))


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _part(
    file: str, layers: Sequence[PlannedLayer], outputs: Mapping[str, Mapping[str, TensorSpec]]
) -> Part:
    tensors: dict[str, PlacedTensor] = {}
    start = 0
    for name, spec in _in_aligned_order(layers, outputs):
        tensors[name] = PlacedTensor(spec, start)
        start += spec.num_bytes
    return Part(file, tuple(layers), tensors, _header(tensors))


def _in_aligned_order(
    layers: Sequence[PlannedLayer], outputs: Mapping[str, Mapping[str, TensorSpec]]
) -> list[tuple[str, TensorSpec]]:
    """Layer after layer, those last whose bytes would leave the next one unaligned.

    The format knows no gaps between tensors.
    """
    whole: list[tuple[str, TensorSpec]] = []
    rest: list[tuple[str, TensorSpec]] = []
    for layer in layers:
        named = [(layer.tensor_name(s), spec) for s, spec in outputs[layer.name].items()]
        size = sum(spec.num_bytes for _, spec in named)
        (rest if size % _ALIGNMENT else whole).extend(_widest_first(named))
    return whole + _widest_first(rest)


def _widest_first(named: list[tuple[str, TensorSpec]]) -> list[tuple[str, TensorSpec]]:
    return sorted(named, key=lambda item: -DTYPE_BITS[item[1].dtype])


def _header(tensors: Mapping[str, PlacedTensor]) -> bytes:
    """Source: https://github.com/huggingface/safetensors#format; padded as the library does."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": tensor.spec.dtype,
            "shape": list(tensor.spec.shape),
            "data_offsets": [tensor.start, tensor.start + tensor.spec.num_bytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
