"""The format that a layer is stored in, told from its tensors first and config.json second.

The whole-checkpoint `quantization_config` may name a method that one layer is not stored in
(`modules_to_not_convert`), or leave out one that it is; tensors decide, the config only says what
headers cannot (block sizes of ragged grids, GPTQ's zero convention).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.checkpoint.headers import StoredTensor

FLOAT_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclasses.dataclass(frozen=True)
class StoredFormat:
    """How one layer is stored.

    Attributes:
        method: canonical method key, or an empty string where no method of ours reads it.
        arguments: the method's arguments as far as the stored tensors fix them.
        N: output features.
        K: input features.
        description: for people, such as `gptq 4-bit group 128` or `compressed-tensors`.
    """

    method: str
    arguments: Mapping[str, Any]
    N: int
    K: int
    description: str


def detect_format(
    tensors: Mapping[str, StoredTensor], quantization_config: Mapping[str, Any]
) -> StoredFormat | None:
    """Tell how a layer with a weight matrix is stored.

    Args:
        tensors: parameter suffix -> tensor, all of one layer.
        quantization_config: what the source's config.json says; may be empty.
    Returns:
        the format; None where the layer holds no weight matrix (a norm, say).
    """
    if "qweight" in tensors:
        return _integer_packed(tensors, quantization_config)
    if "weight_packed" in tensors:
        return _unreadable(tensors, "compressed-tensors pack-quantized")
    weight = tensors.get("weight")
    if weight is None or len(weight.shape) != 2:
        return None
    N, K = weight.shape
    if weight.dtype in FLOAT_DTYPES:
        dtype = FLOAT_DTYPES[weight.dtype]
        return StoredFormat("bf16", {"dtype": dtype}, N, K, dtype)
    if weight.dtype == "F8_E4M3":
        return _fp8(tensors, quantization_config, N, K)
    if weight.dtype == "I8" and _is_block_grid(tensors.get("weight_scale_inv")):
        block = _block_size(tensors["weight_scale_inv"], quantization_config, N, K)
        return StoredFormat(
            "blockwise_int8", {"weight_block_size": block}, N, K, f"int8 block {block}"
        )
    return _unreadable(tensors, f"{weight.dtype} weights with {', '.join(sorted(tensors))}")


def _fp8(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], N: int, K: int
) -> StoredFormat:
    inverse = config.get("weight_scale_semantics") == "inverse"
    scale_inv, scale = tensors.get("weight_scale_inv"), tensors.get("weight_scale")
    if not inverse and _is_block_grid(scale_inv):
        assert scale_inv is not None
        block = _block_size(scale_inv, config, N, K)
        return StoredFormat(
            "fp8",
            {"weight_block_size": block, "activation_scheme": "dynamic"},
            N,
            K,
            f"fp8 block {block}",
        )
    if scale is not None and scale.shape in ((), (1,)):
        activations = "static" if "input_scale" in tensors else "dynamic"
        return StoredFormat(
            "fp8",
            {"weight_block_size": None, "activation_scheme": activations},
            N,
            K,
            "fp8 per tensor",
        )
    return _unreadable(tensors, "fp8 with scales per channel or in compressed-tensors form")


def _is_block_grid(scale: StoredTensor | None) -> bool:
    return scale is not None and len(scale.shape) == 2


def _block_size(scale: StoredTensor, config: Mapping[str, Any], N: int, K: int) -> list[int]:
    declared = config.get("weight_block_size")
    if isinstance(declared, (list, tuple)) and len(declared) == 2:
        return [int(n) for n in declared]
    rows, columns = scale.shape
    return [_square_size(N, rows), _square_size(K, columns)]


def _square_size(length: int, count: int) -> int:
    """The usual power-of-two block size that cuts `length` into `count` blocks."""
    for size in (128, 64, 32, 256):
        if -(-length // size) == count:
            return size
    return -(-length // count)


def _integer_packed(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> StoredFormat:
    scales, zeros, packed = (tensors.get(k) for k in ("scales", "qzeros", "qweight"))
    if scales is None or zeros is None or packed is None or len(scales.shape) != 2:
        return _unreadable(tensors, "a qweight without scales and qzeros")
    groups, N = scales.shape
    rows, columns = packed.shape
    if columns * 8 == N and columns != N:
        group = _group_size(rows, groups)
        arguments = {"bits": 4, "group_size": group, "zero_point": True}
        return StoredFormat("awq", arguments, N, rows, f"awq 4-bit group {group}")
    if columns == N and zeros.shape[1] > 0:
        bits = 32 * zeros.shape[1] // N
        if bits not in (4, 8):
            return _unreadable(tensors, f"gptq {bits}-bit")
        K = rows * 32 // bits
        group = _group_size(K, groups)
        if "g_idx" not in tensors:
            return _unreadable(tensors, "gptq without g_idx", N, K)
        if str(config.get("checkpoint_format", "gptq")) not in ("gptq", ""):
            return _unreadable(tensors, f"gptq {config['checkpoint_format']}", N, K)
        arguments = {
            "bits": bits,
            "group_size": group,
            "sym": bool(config.get("sym", True)),
            "desc_act": bool(config.get("desc_act", False)),
        }
        return StoredFormat("gptq", arguments, N, K, f"gptq {bits}-bit group {group}")
    return _unreadable(tensors, "an unknown packing of qweight", N)


def _group_size(K: int, groups: int) -> int:
    return -1 if groups == 1 else K // groups


def _unreadable(
    tensors: Mapping[str, StoredTensor], description: str, N: int = 0, K: int = 0
) -> StoredFormat:
    weight = tensors.get("weight") or tensors.get("weight_packed") or tensors.get("qweight")
    if weight is not None and len(weight.shape) == 2 and not N:
        N, K = weight.shape
    return StoredFormat("", {}, N, K, description)
