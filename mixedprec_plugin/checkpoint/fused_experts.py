"""Experts that a checkpoint stores in one tensor, as slices of it.

    gate_up_proj  [E, 2I, H], gate above up     ->  E x gate_proj [I, H], up_proj [I, H]
    down_proj     [E, H, I]                     ->  E x down_proj [H, I]

and beside them, suffixed `_scale_inv`, the scales of their blocks, and `_bias`, [E, 2I] and [E, H].
All of these are runs of bytes in the file. Stored the other way around, [E, H, 2I], the columns of
an expert's gate are not, and nothing is sliced.

gpt-oss has them in MXFP4, and of an expert's rows the even ones are gate, the odd ones up:

    gate_up_proj_blocks  uint8 [E, 2I, H/32, 16]    gate_up_proj_scales  uint8 [E, 2I, H/32]
    down_proj_blocks     uint8 [E, H, I/32, 16]     down_proj_scales     uint8 [E, H, I/32]

and `_bias` likewise. A projection's tensors are `weight` [N, K/2], `weight_scale` and `bias` then.

Source: transformers' experts modules (integrations/moe.py; models/mixtral/modeling_mixtral.py,
`MixtralExperts`), whose `is_transposed` ones are those of Llama 4 and gpt-oss; of MXFP4
integrations/mxfp4.py, `convert_moe_packed_tensors`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.families.config import text_config

_HALVES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# how the name of a tensor ends -> its part's suffix; the weights come first
_FLOATS = {"": "weight", "_scale_inv": "weight_scale_inv", "_bias": "bias"}
_MXFP4 = {"_blocks": "weight", "_scales": "weight_scale", "_bias": "bias"}
# weights of a block, and its bytes
_BLOCK, _BLOCK_BYTES = 32, 16
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
    """
    ends, parts = _ends(tensors), _parts(tensors)
    is_packed = ends is _MXFP4
    needed = ("_blocks", "_scales") if is_packed else ("",)
    if not {half + end for half in _HALVES for end in needed} <= tensors.keys() <= parts.keys():
        named = ", ".join(sorted(tensors.keys() - {"weight"}))
        return f"its experts are stored in {named or 'one tensor'}"
    gate_up, down = (_weight_shape(tensors, projection) for projection in _HALVES)
    hidden = text_config(config).get("hidden_size")
    if len(gate_up) != 3 or len(down) != 3 or 0 in (*gate_up, *down):
        return f"its experts are stored as {list(gate_up)} and {list(down)}"
    num_experts, inner = gate_up[0], down[2]
    if gate_up == (num_experts, 2 * inner, hidden) and down == (num_experts, hidden, inner):
        for suffix, tensor in tensors.items():
            projection = parts[suffix][0]
            count, rows = len(_HALVES[projection]), (gate_up, down)[projection == "down_proj"][1]
            shape = list(tensor.shape)
            if len(shape) < 2 or shape[0] != num_experts or shape[1] % count:
                return f"{suffix} {shape} cannot be split over its {num_experts} experts"
            if suffix.endswith("_scale_inv") and not _is_aligned(rows, shape[1], count):
                return f"no block of {suffix} {shape} ends where gate does, at row {rows // count}"
            if is_packed and shape[1] != rows:
                return f"{suffix} {shape} is of other experts than those of {rows} rows"
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


def _ends(tensors: Tensors) -> Mapping[str, str]:
    return _MXFP4 if "gate_up_proj_blocks" in tensors else _FLOATS


def _parts(tensors: Tensors) -> dict[str, tuple[str, str]]:
    """Parameter suffix -> projection and the suffix of its part, whether or not it is there."""
    ends = _ends(tensors).items()
    return {half + end: (half, suffix) for half in _HALVES for end, suffix in ends}


def _weight_shape(tensors: Tensors, projection: str) -> tuple[int, ...]:
    """The shape of the weights that a tensor holds; as it is stored where it is none of blocks."""
    ends = _ends(tensors)
    shape = tensors[projection + next(iter(ends))].shape
    if ends is _FLOATS or len(shape) != 4 or shape[3] != _BLOCK_BYTES:
        return shape
    return (*shape[:2], _BLOCK * shape[2])


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
    found, step = _parts(tensors), 2 if _ends(tensors) is _MXFP4 else 1
    for expert in range(num_experts(tensors)):
        for fused, halves in _HALVES.items():
            for number, half in enumerate(halves):
                layer = f"{name}.{expert}.{half}"
                cut = _Cut(expert, number, len(halves), min(step, len(halves)))
                parts = {
                    suffix: _slice(tensors[stored], f"{layer}.{suffix}", cut)
                    for stored, (projection, suffix) in found.items()
                    if projection == fused and stored in tensors
                }
                yield layer, parts


def num_experts(tensors: Tensors) -> int:
    """How many experts the tensors of a fused layer hold, which can be split."""
    return _weight_shape(tensors, "gate_up_proj")[0]


class _Cut(NamedTuple):
    """Which part of a tensor of experts: the `number`th of `parts` of an expert's rows.

    Every `step`th row where it is not 1.
    """

    expert: int
    number: int
    parts: int
    step: int


def _slice(tensor: StoredTensor, name: str, cut: _Cut) -> StoredTensor:
    """A part of a tensor; what is stored in blocks of bytes has them one after the other."""
    num_experts, rows, *rest = tensor.shape
    expert_bytes = tensor.num_bytes // num_experts
    num_bytes = expert_bytes // cut.parts
    before = cut.number * (num_bytes if cut.step == 1 else expert_bytes // rows)
    start = tensor.start + cut.expert * expert_bytes + before
    shape = (rows // cut.parts, *([math.prod(rest)] if rest[1:] else rest))
    return StoredTensor(name, tensor.dtype, shape, tensor.path, start, num_bytes, tensor, cut.step)
