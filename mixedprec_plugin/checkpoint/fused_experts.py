"""Experts that a checkpoint stores in one tensor, as slices of it.

    gate_up_proj  [E, 2I, H], gate above up     ->  E x gate_proj [I, H], up_proj [I, H]
    down_proj     [E, H, I]                     ->  E x down_proj [H, I]

and beside them, suffixed `_scale_inv`, the scales of their blocks, and `_bias`, [E, 2I] and [E, H].
All of these are runs of bytes in the file. Stored the other way around, [E, H, 2I], the columns of
an expert's gate are not, and nothing is sliced.

Source: transformers' experts modules (integrations/moe.py; models/mixtral/modeling_mixtral.py,
`MixtralExperts`), whose `is_transposed` ones are those of Llama 4 and gpt-oss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.families.config import text_config

_HALVES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_SUFFIXES = {"": "weight", "_scale_inv": "weight_scale_inv", "_bias": "bias"}
_PARTS = {
    projection + end: (projection, suffix)
    for projection in _HALVES
    for end, suffix in _SUFFIXES.items()
}
# rows that share a scale, as tools choose them; no two make as many blocks of several
_BLOCK_ROWS = (1, 128, 64, 32, 256)
_PROJECTIONS = tuple(_HALVES)
# of all layers together; the largest models have 50,000
MAX_EXPERTS = 1 << 18
_OWN_LAYERS = tuple(f".experts.{projection}" for projection in _HALVES)

Tensors = Mapping[str, StoredTensor]


def is_fused(name: str, tensors: Tensors) -> bool:
    """Whether a layer holds the experts of a block in one tensor, by the names of its tensors."""
    if name.endswith(".experts"):
        return any(suffix.startswith(_PROJECTIONS) for suffix in tensors)
    return name.endswith(_OWN_LAYERS)


def why_not_split(tensors: Tensors, config: Mapping[str, Any]) -> str:
    """Return why fused experts cannot be taken apart; empty if they can.

    Args:
        tensors: parameter suffix -> tensor, of a layer that `is_fused`.
        config: the model's config.json.
    """
    unknown = sorted(tensors.keys() - _PARTS.keys())
    if unknown or not tensors.keys() >= _HALVES.keys():
        named = ", ".join(sorted(tensors.keys() - {"weight"}))
        return f"its experts are stored in {named or 'one tensor'}"
    gate_up, down = tensors["gate_up_proj"].shape, tensors["down_proj"].shape
    hidden = text_config(config).get("hidden_size")
    if len(gate_up) != 3 or len(down) != 3 or 0 in (*gate_up, *down):
        return f"its experts are stored as {list(gate_up)} and {list(down)}"
    num_experts, inner = gate_up[0], down[2]
    if gate_up == (num_experts, 2 * inner, hidden) and down == (num_experts, hidden, inner):
        for suffix, tensor in tensors.items():
            count = len(_HALVES[_PARTS[suffix][0]])
            if len(tensor.shape) < 2 or tensor.shape[0] != num_experts or tensor.shape[1] % count:
                shape = list(tensor.shape)
                return f"{suffix} {shape} cannot be split over its {num_experts} experts"
            rows = tensors[_PARTS[suffix][0]].shape[1]
            if suffix.endswith("_scale_inv") and not _is_aligned(rows, tensor.shape[1], count):
                shape = list(tensor.shape)
                return f"no block of {suffix} {shape} ends where gate does, at row {rows // count}"
        return ""
    if gate_up[1] == hidden and down[2] == hidden:
        return (
            f"its experts are stored transposed, {list(gate_up)} (expected "
            f"{[num_experts, gate_up[2], gate_up[1]]}), and gate and up of one are no runs of bytes"
        )
    return (
        f"its experts are stored as {list(gate_up)} and {list(down)} (expected [E, 2I, {hidden}] "
        f"and [E, {hidden}, I])"
    )


def _is_aligned(rows: int, num_blocks: int, num_parts: int) -> bool:
    """Whether blocks of rows, one scale each, end where each part of the rows does."""
    block = next((size for size in _BLOCK_ROWS if -(-rows // size) == num_blocks), 0)
    return num_parts == 1 or (block > 0 and rows // num_parts % block == 0)


def split_experts(name: str, tensors: Tensors) -> Iterator[tuple[str, dict[str, StoredTensor]]]:
    """Yield (layer name, its tensors) for every projection of every expert.

    Args:
        name: name of the fused layer, `model.layers.0.mlp.experts`.
        tensors: its tensors, of which `why_not_split` knows nothing against it.
    """
    for expert in range(tensors["gate_up_proj"].shape[0]):
        for fused, halves in _HALVES.items():
            for number, half in enumerate(halves, expert * len(halves)):
                layer = f"{name}.{expert}.{half}"
                parts = {
                    suffix: _slice(tensors[stored], f"{layer}.{suffix}", number, len(halves))
                    for stored, (projection, suffix) in _PARTS.items()
                    if projection == fused and stored in tensors
                }
                yield layer, parts


def _slice(tensor: StoredTensor, name: str, number: int, num_halves: int) -> StoredTensor:
    """The `number`th piece of a tensor that is cut into experts, and these into halves."""
    num_experts, rows, *rest = tensor.shape
    num_bytes = tensor.num_bytes // (num_experts * num_halves)
    start = tensor.start + number * num_bytes
    shape = (rows // num_halves, *rest)
    return StoredTensor(name, tensor.dtype, shape, tensor.path, start, num_bytes, tensor)
