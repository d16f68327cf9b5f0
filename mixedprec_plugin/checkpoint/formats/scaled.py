"""8-bit weights beside a scale: FP8 and INT8, per tensor, channel, group and block.

The name of the scale says nothing of its direction: DeepSeek's `weight_scale_inv` multiplies
(W = q * scale), gptqmodel's is a true reciprocal (W = q / scale) and its config says so
(`weight_scale_semantics: inverse`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mixedprec_plugin.checkpoint.formats.promise import Promise
from mixedprec_plugin.checkpoint.formats.stored import (
    FLOAT_DTYPES,
    StoredFormat,
    Tensors,
    incomplete,
    unusable,
)

CODE_DTYPES = {"F8_E4M3": ("fp8", "fp8"), "F8_E5M2": ("fp8", "fp8 e5m2"), "I8": ("int8", "int8")}
_INPUT_SUFFIXES = frozenset({"input_scale", "input_zero_point"})
_USUAL_BLOCK_SIZES = (128, 64, 32, 256)


@dataclasses.dataclass(frozen=True)
class ScaleGrid:
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


def detect_scaled(tensors: Tensors, promise: Promise) -> StoredFormat:
    """Tell how a layer with an 8-bit `weight` [N, K] is stored."""
    weight = tensors["weight"]
    N, K = weight.shape
    family, label = CODE_DTYPES[weight.dtype]
    suffix = next((s for s in ("weight_scale_inv", "weight_scale") if s in tensors), "")
    if not suffix:
        return incomplete(tensors, label, ["weight_scale"], family)
    direction = promise.config.get("weight_scale_semantics")
    divides = suffix == "weight_scale_inv" and direction == "inverse"
    grid = scale_grid(
        tensors, suffix, promise, prefer_block=suffix.endswith("_inv") and not divides
    )
    reason = _why_unusable(tensors, suffix, grid, promise)
    if reason or grid is None:
        return unusable(tensors, f"{label} {reason}", N, K, family=family)
    has_zeros = "weight_zero_point" in tensors
    notes = [
        "asymmetric" if has_zeros else "",
        "reciprocal scales" if divides else "",
        promise.format,
    ]
    noted = ", ".join(filter(None, notes))
    method, arguments = _method(tensors, suffix, grid, promise, divides=divides)
    facts: dict[str, Any] = {"bits": 8, "strategy": grid.strategy, "symmetric": not has_zeros}
    facts |= {"block": list(grid.block)} if grid.strategy == "block" else {}
    facts |= {"group_size": grid.block[1]} if grid.strategy == "group" else {}
    matrix = {"weight", "weight_zero_point", suffix} | _INPUT_SUFFIXES
    return StoredFormat(
        method,
        arguments,
        N,
        K,
        f"{label} {grid} ({noted})" if noted else f"{label} {grid}",
        family=family,
        facts=facts,
        suffixes=frozenset(matrix) & frozenset(tensors),
        dequantizer="mixedprec_plugin.quantize.scaled:dequantize",
        dequantizer_arguments={
            "codes": "weight", "scale": suffix, "zero_point": "weight_zero_point",
            "block": list(grid.block), "reciprocal": divides,
        },
    )  # fmt: skip


def _why_unusable(tensors: Tensors, suffix: str, grid: ScaleGrid | None, promise: Promise) -> str:
    """Say why the codes cannot be scaled; an empty string if they can."""
    scale, zeros = tensors[suffix], tensors.get("weight_zero_point")
    direction = promise.config.get("weight_scale_semantics")
    if scale.dtype not in FLOAT_DTYPES:
        return f"with {suffix} of {scale.dtype}"
    if grid is None:
        return f"with {suffix} of {list(scale.shape)}, which fits no usual block size"
    if "weight_scale_inv" in tensors and "weight_scale" in tensors:
        return "with both weight_scale and weight_scale_inv"
    if direction not in (None, "inverse"):
        return f"with weight_scale_semantics {direction!r}"
    # DeepSeek's blocks, and the scalars that transformers writes as `quant_method: fp8`, multiply
    multiplies = grid.strategy == "block" or (
        grid.strategy == "tensor" and promise.config.get("quant_method") == "fp8"
    )
    is_gptqmodels = "weight_scale_method" in promise.config
    if suffix == "weight_scale_inv" and direction is None and (is_gptqmodels or not multiplies):
        return f"{grid} with a weight_scale_inv of unknown direction"
    if "weight_g_idx" in tensors:
        return f"{grid} with weight_g_idx"
    if zeros is not None and (zeros.dtype != "I8" or zeros.shape != scale.shape):
        return f"{grid} with weight_zero_point {zeros.dtype} {list(zeros.shape)}"
    return ""


def scale_grid(
    tensors: Tensors, suffix: str, promise: Promise, *, prefer_block: bool, codes: str = "weight"
) -> ScaleGrid | None:
    """Tell from the shape of a scale which elements share one; None where nothing tells."""
    shape = tensors[suffix].shape
    N, K = tensors[codes].shape
    if len(shape) == 2:
        promised = promise.facts.get("block")
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
    rows, columns = _usual_size(N, shape[0]), _usual_size(K, shape[1])
    return ScaleGrid("block", (rows, columns)) if rows and columns else None


def _usual_size(length: int, count: int) -> int:
    """The usual block size that cuts `length` into `count` blocks; 0 if there is none."""
    return next((size for size in _USUAL_BLOCK_SIZES if -(-length // size) == count), 0)


def _method(
    tensors: Tensors, suffix: str, grid: ScaleGrid, promise: Promise, *, divides: bool
) -> tuple[str, dict[str, Any]]:
    """The method that serves the tensors as they are, and its arguments."""
    dtype = tensors["weight"].dtype
    if divides or dtype == "F8_E5M2" or "weight_zero_point" in tensors:
        return "", {}
    if suffix == "weight_scale_inv" and grid.strategy == "block":
        if dtype == "I8":
            return "blockwise_int8", {"weight_block_size": list(grid.block)}
        return "fp8", {"weight_block_size": list(grid.block), "activation_scheme": "dynamic"}
    if dtype == "F8_E4M3" and suffix == "weight_scale" and tensors[suffix].shape in ((), (1,)):
        activations = "static" if "input_scale" in tensors else "dynamic"
        return "fp8", {"weight_block_size": None, "activation_scheme": activations}
    if dtype == "F8_E4M3" and suffix == "weight_scale" and _is_channel(tensors, promise):
        return "fp8_channel", {}
    return "", {}


def _is_channel(tensors: Tensors, promise: Promise) -> bool:
    """Whether there is a scale a row, and nothing tells that activations have other than a token's.

    A layer whose activations are not quantized, or otherwise, is served so by `auto` alone.
    """
    if tensors["weight_scale"].shape != (tensors["weight"].shape[0], 1):
        return False
    inputs = promise.facts.get("inputs", {}) if promise.family == "fp8" else {}
    is_unsaid = inputs == {} and "input_scale" not in tensors
    return is_unsaid or bool(inputs and inputs["dynamic"] and not inputs["group_size"])
