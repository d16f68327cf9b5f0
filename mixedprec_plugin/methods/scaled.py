"""8-bit weights beside a scale: FP8 and INT8, per tensor, channel, group and block.

The name of the scale says nothing of its direction: DeepSeek's `weight_scale_inv` multiplies
(W = q * scale), gptqmodel's is a true reciprocal (W = q / scale) and its config says so
(`weight_scale_semantics: inverse`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mixedprec_plugin.methods.interface import Arguments
from mixedprec_plugin.methods.stored import (
    FLOAT_DTYPES,
    Said,
    StoredFormat,
    Tensors,
    block_of,
    incomplete,
    unusable,
)

CODEC = "mixedprec_plugin.quantize.scaled"
# dtype -> encoding, words for it, largest relative RMS error that rounding to it explains
CODES = {
    "F8_E4M3": ("fp8", "fp8", 0.0625),
    "F8_E5M2": ("fp8", "fp8 e5m2", 0.0625),
    "I8": ("int8", "int8", 0.05),
}
# of activations, beside their "input_scale": Mistral's, fbgemm's, compressed-tensors'
_INPUTS = frozenset({"activation_scale", "input_scale_ub", "input_zero_point"})
# its parameters are e4m3's, and its loaders cast what they are given (layers/parameter.py:224)
_NO_E5M2 = "SGLang's classes hold FP8 weights in e4m3"
_USUAL_BLOCK_SIZES = (128, 64, 32, 256)


class ScaleGrid(NamedTuple):
    """Which elements share a scale.

    Attributes:
        strategy: `tensor`, `channel`, `group` or `block`, in compressed-tensors' words.
        block: [rows, columns] that share one.
    """

    strategy: str
    block: tuple[int, int]

    def __str__(self) -> str:
        if self.strategy == "block":
            return f"block {list(self.block)}"
        return f"group {self.block[1]}" if self.strategy == "group" else f"per {self.strategy}"


def block_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `weight_block_size` of a config.json says."""
    block = block_of(config.get("weight_block_size"))
    if not block:
        return {}
    # such layers' activations are quantized in groups as long as a block
    inputs = {"dynamic": config.get("activation_scheme") != "static", "group_size": block[1]}
    return {"block": block, "strategy": "block", "inputs": inputs}


def recognize_scaled(tensors: Tensors, said: Said) -> StoredFormat | None:
    """Tell how a layer with an 8-bit `weight` [N, K] is stored, whichever method serves it."""
    weight = tensors.get("weight")
    if weight is None or len(weight.shape) != 2 or weight.dtype not in CODES:
        return None
    N, K = weight.shape
    encoding, label, limit = CODES[weight.dtype]
    suffix = next((s for s in ("weight_scale_inv", "weight_scale") if s in tensors), "")
    if not suffix:
        return incomplete(tensors, label, ["weight_scale"], encoding)
    direction = said.config.get("weight_scale_semantics")
    divides = suffix == "weight_scale_inv" and direction == "inverse"
    grid = scale_grid(tensors, suffix, said, prefer_block=suffix.endswith("_inv") and not divides)
    reason = _why_unusable(tensors, suffix, grid, said)
    if reason or grid is None:
        return unusable(tensors, f"{label} {reason}", N, K, encoding=encoding)
    has_zeros = "weight_zero_point" in tensors
    own_label = said.label if said.encoding in (None, encoding) else ""
    notes = {"asymmetric": has_zeros, "reciprocal scales": divides, own_label: own_label}
    noted = ", ".join(note for note, is_so in notes.items() if is_so)
    facts: dict[str, Any] = {"bits": 8, "strategy": grid.strategy, "symmetric": not has_zeros}
    if grid.strategy == "block":
        facts["block"] = list(grid.block)
    elif grid.strategy == "group":
        facts["group_size"] = grid.block[1]
    matrix = {"weight", "weight_zero_point", suffix, "input_scale", *_INPUTS}
    return StoredFormat(
        "",
        {},
        N,
        K,
        f"{label} {grid} ({noted})" if noted else f"{label} {grid}",
        encoding=encoding,
        numbers="scaled",
        facts=facts,
        suffixes=frozenset(matrix & tensors.keys()),
        codec=CODEC,
        how={
            "codes": "weight",
            "scale": suffix,
            "zero_point": "weight_zero_point",
            "block": list(grid.block),
            "reciprocal": divides,
        },
        limit=limit,
        no_class=_NO_E5M2 if weight.dtype == "F8_E5M2" else "",
    )


def recognize_served(tensors: Tensors, said: Said, dtype: str, suffix: str) -> StoredFormat | None:
    """The same, where the codes are of a dtype and the scales, named so, multiply; else None."""
    weight = tensors.get("weight")
    if weight is None or weight.dtype != dtype or tensors.keys() & _INPUTS:
        return None
    found = recognize_scaled(tensors, said)
    if found is None or found.how.get("scale") != suffix or found.how["reciprocal"]:
        return None
    return found if found.facts["symmetric"] else None


def _why_unusable(tensors: Tensors, suffix: str, grid: ScaleGrid | None, said: Said) -> str:
    """Say why the codes cannot be scaled; an empty string if they can."""
    scale, zeros = tensors[suffix], tensors.get("weight_zero_point")
    direction = said.config.get("weight_scale_semantics")
    if scale.dtype not in FLOAT_DTYPES:
        return f"with {suffix} of {scale.dtype}"
    if grid is None:
        return f"with {suffix} of {list(scale.shape)}, which fits no usual block size"
    if "weight_scale_inv" in tensors and "weight_scale" in tensors:
        return "with both weight_scale and weight_scale_inv"
    if direction not in (None, "inverse"):
        return f"with weight_scale_semantics {direction!r}"
    # DeepSeek's blocks, and the scalars that transformers writes as `quant_method: fp8`, multiply;
    # gptqmodel, which says its method, may mean either
    known = ("block", "tensor") if said.config.get("quant_method") == "fp8" else ("block",)
    multiplies = grid.strategy in known and "weight_scale_method" not in said.config
    if suffix == "weight_scale_inv" and direction is None and not multiplies:
        return f"{grid} with a weight_scale_inv of unknown direction"
    if "weight_g_idx" in tensors:
        return f"{grid} with weight_g_idx"
    if zeros is not None and (zeros.dtype != "I8" or zeros.shape != scale.shape):
        return f"{grid} with weight_zero_point {zeros.dtype} {list(zeros.shape)}"
    return ""


def scale_grid(
    tensors: Tensors, suffix: str, said: Said, *, prefer_block: bool, codes: str = "weight"
) -> ScaleGrid | None:
    """Tell from the shape of a scale which elements share one; None where nothing tells."""
    shape = tensors[suffix].shape
    N, K = tensors[codes].shape
    if len(shape) == 2:
        promised = said.facts.get("block")
        if promised and (-(-N // promised[0]), -(-K // promised[1])) == shape:
            return ScaleGrid("block", (promised[0], promised[1]))
        if prefer_block and (block := _usual_block(shape, N, K)):
            return block
    if math.prod(shape) == 1:
        return ScaleGrid("tensor", (N, K))
    if shape in ((N,), (N, 1)):
        return ScaleGrid("channel", (1, K))
    if len(shape) != 2:
        return None
    if shape[0] == N and shape[1] and K % shape[1] == 0:
        return ScaleGrid("group", (1, K // shape[1]))
    return _usual_block(shape, N, K)


def _usual_block(shape: tuple[int, ...], N: int, K: int) -> ScaleGrid | None:
    rows, columns = (
        next((size for size in _USUAL_BLOCK_SIZES if -(-length // size) == count), 0)
        for length, count in zip((N, K), shape, strict=True)
    )
    return ScaleGrid("block", (rows, columns)) if rows and columns else None


def _has_same_codes(stored: StoredFormat, tensors: Tensors, dtype: str) -> bool:
    """Whether a layer holds codes of a dtype that are multiplied by scales, and nothing else."""
    how = stored.how
    if stored.numbers != "scaled" or how.get("reciprocal") or how.get("zero_point") in tensors:
        return False
    return how.get("codes") == "weight" and tensors["weight"].dtype == dtype


def recognize_channels(tensors: Tensors, said: Said, dtype: str) -> StoredFormat | None:
    """Take codes of a dtype beside a `weight_scale` a row, where activations may have one a token.

    A layer whose activations are not quantized, or otherwise, is served so by `auto` alone.
    """
    found = recognize_served(tensors, said, dtype, "weight_scale")
    if found is None or tensors["weight_scale"].shape != (found.N, 1):
        return None
    inputs = said.of(found.encoding).get("inputs", {})
    is_unsaid = inputs == {} and "input_scale" not in tensors
    is_a_token = bool(inputs) and inputs["dynamic"] and not inputs["group_size"]
    return found if is_unsaid or is_a_token else None


def says_channels(encoding: str) -> Callable[[Mapping[str, Any], str], Said]:
    """Return the `read_config` of a method whose weights have a scale a channel."""
    inputs = {"dynamic": True, "group_size": None}
    return lambda _config, _name: Said(encoding, {"strategy": "channel", "inputs": inputs})


def why_not_channels(
    dtype: str, stored: StoredFormat, _arguments: Arguments, tensors: Tensors, _may_round: bool
) -> str | None:
    """As `Method.why_not_repack`, of codes of a dtype with a scale a channel, or one for all."""
    if not _has_same_codes(stored, tensors, dtype) or "input_scale" in tensors:
        return None
    return "" if stored.facts.get("strategy") in ("tensor", "channel") else None


def why_not_scaled(
    dtype: str, stored: StoredFormat, arguments: Arguments, tensors: Tensors, _may_round: bool
) -> str | None:
    """As `Method.why_not_repack`, of codes of a dtype with one scale, or one a block."""
    if not _has_same_codes(stored, tensors, dtype):
        return None
    static = "input_scale" in tensors
    if arguments["activation_scheme"] != ("static" if static else "dynamic"):
        return None
    if static and math.prod(tensors["input_scale"].shape) != 1:
        return None
    block, strategy = arguments["weight_block_size"], stored.facts.get("strategy")
    if block is None:
        return "" if strategy == "tensor" else None
    if strategy != "block" or list(stored.how["block"]) != block:
        return None
    # a layer whose activations are quantized otherwise, or not at all, would compute other numbers
    inputs: Mapping[str, Any] = stored.said.get("inputs") or {}
    is_same = bool(inputs.get("dynamic")) and inputs.get("group_size") == block[1]
    return "" if is_same else None
