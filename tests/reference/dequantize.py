"""Dequantize every stored format in plain numpy: the reference for the package's own code.

Written from the formats' definitions, for legibility. It shares no code with the package, and it is
checked against checkpoints that other people's tools wrote. Arrays are float32 for every floating
dtype (`safetensors_file.read_safetensors` returns them so) and integers as stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]
F32 = np.float32


def dequantize_method(method: str, tensors: Arrays, arguments: Mapping[str, Any]) -> np.ndarray:
    """Dequantize a layer stored by one of the package's methods.

    Args:
        method: "fp8", "blockwise_int8", "awq" or "gptq".
        tensors: tensor suffix -> array.
        arguments: the method's arguments, such as "group_size".
    Returns:
        float32 [N, K].
    Raises:
        KeyError: another method, or a missing tensor or argument.
    """
    if method in ("fp8", "fp8_channel", "blockwise_int8", "int8_channel"):
        block = arguments.get("weight_block_size")
        if block is None:
            return by_channel(tensors["weight"], tensors["weight_scale"])
        return by_block(tensors["weight"], tensors["weight_scale_inv"], block)
    readers = {"awq": awq, "gptq": gptq, "humming": humming, "nvfp4": nvfp4, "mxfp4": mxfp4}
    return readers[method](tensors, arguments)


def dequantize_checkpoint(tensors: Arrays, config: Mapping[str, Any]) -> np.ndarray:
    """Dequantize a layer of another tool's checkpoint.

    Args:
        tensors: tensor suffix -> array.
        config: the checkpoint's `quantization_config`.
    Returns:
        float32 [N, K].
    Raises:
        ValueError: a quant_method that is not known here.
    """
    method = config["quant_method"]
    if method == "modelopt":
        return nvfp4(tensors, config)
    if method == "compressed-tensors":
        return compressed(tensors, config["config_groups"]["group_0"])
    if method == "fp8" and config.get("weight_scale_semantics") == "inverse":
        return tensors["weight"] / tensors["weight_scale_inv"].reshape(-1, 1)
    if method == "awq" or config.get("packing_format") == "auto_round:auto_awq":
        return awq(tensors, config)
    if method == "gptq" or config.get("packing_format") == "auto_round:auto_gptq":
        return gptq(tensors, config)
    raise ValueError(f"quant_method {method!r} is not known")


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Split int32 words [..., n] into codes [..., n * 32 / bits], lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return codes.reshape(*words.shape[:-1], -1).astype(np.int32)


def awq(tensors: Arrays, arguments: Mapping[str, Any]) -> np.ndarray:
    """AWQ GEMM: nibble i of a word is column [0, 2, 4, 6, 1, 3, 5, 7][i]; (q - zero) * scale."""
    column_of_nibble = [0, 2, 4, 6, 1, 3, 5, 7]

    def columns(words: np.ndarray) -> np.ndarray:
        nibbles = unpack(np.ascontiguousarray(words), 4).reshape(len(words), -1, 8)
        ordered = np.empty_like(nibbles)
        ordered[:, :, column_of_nibble] = nibbles
        return ordered.reshape(len(words), -1)

    codes, zeros = columns(tensors["qweight"]), columns(tensors["qzeros"])
    group = _group_of_row(len(codes), arguments["group_size"])
    return ((codes - zeros[group]).astype(F32) * tensors["scales"][group]).T


def gptq(tensors: Arrays, arguments: Mapping[str, Any]) -> np.ndarray:
    """GPTQ: words along K, zeros along N less one (v1), a row's group from g_idx."""
    bits = arguments["bits"]
    codes = unpack(np.ascontiguousarray(tensors["qweight"].T), bits).T
    zeros = unpack(np.ascontiguousarray(tensors["qzeros"]), bits)
    if arguments.get("checkpoint_format") != "gptq_v2":
        zeros = zeros + 1
    group = tensors.get("g_idx")
    if group is None:
        group = _group_of_row(len(codes), arguments["group_size"])
    return ((codes - zeros[group]).astype(F32) * tensors["scales"][group]).T


def humming(tensors: Arrays, arguments: Mapping[str, Any]) -> np.ndarray:
    """humming: a stream of bits along K, the lowest first; the zero point is the middle code."""
    bits = arguments["bits"]
    words = np.ascontiguousarray(tensors["weight"])
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    codes = stream.reshape(len(words), -1, bits).astype(np.int64) @ (1 << np.arange(bits))
    scale = np.repeat(tensors["weight_scale"], arguments["group_size"], axis=1)
    return ((codes - 2 ** (bits - 1)) * scale).astype(np.float32)


def nvfp4(tensors: Arrays, _arguments: Mapping[str, Any]) -> np.ndarray:
    """ModelOpt's NVFP4: codes, times the scale of their 16, times that of the whole."""
    whole = tensors["weight_scale_2"].reshape(())
    return e2m1(tensors["weight"], tensors["weight_scale"]) * whole


def mxfp4(tensors: Arrays, _arguments: Mapping[str, Any]) -> np.ndarray:
    """OCP Microscaling's MXFP4: codes, times a power of two whose exponent is biased by 127."""
    return e2m1(tensors["weight"], e8m0(tensors["weight_scale"]))


def e8m0(exponents: np.ndarray) -> np.ndarray:
    """Scales that are exponents alone."""
    return np.ldexp(F32(1), exponents.astype(np.int32) - 127)


def e2m1(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Sign, two bits of exponent, one of mantissa; the low nibble is the even column."""
    packed = packed.astype(np.uint8)
    codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    # OCP Microscaling v1.0: 2^(e-1) (1 + m/2), and m/2 where e is 0
    values = np.where(exponent == 0, mantissa / 2, 2.0 ** (exponent - 1) * (1 + mantissa / 2))
    signed = np.where(codes & 8, -values, values).astype(F32)
    return signed * np.repeat(scale, signed.shape[1] // scale.shape[1], axis=1)


def by_channel(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """One scale for the tensor, or for every row: q * scale."""
    return weight.astype(F32) * scale.reshape(-1, 1)


def by_block(
    weight: np.ndarray, scale: np.ndarray, block: tuple[int, int] | list[int]
) -> np.ndarray:
    """Element [n, k] has scale [n // block rows, k // block columns]."""
    rows = np.arange(weight.shape[0]) // block[0]
    columns = np.arange(weight.shape[1]) // block[1]
    if scale.shape != (rows[-1] + 1, columns[-1] + 1):
        raise ValueError(f"scales of shape {scale.shape} for {weight.shape} in blocks of {block}")
    return weight.astype(F32) * scale[np.ix_(rows, columns)]


def compressed(tensors: Arrays, group: Mapping[str, Any]) -> np.ndarray:
    """compressed-tensors: pack-quantized, float-quantized and int-quantized."""
    scale, weights = tensors["weight_scale"], group["weights"]
    if group["format"] == "nvfp4-pack-quantized":
        whole = F32(1) / tensors["weight_global_scale"].reshape(())
        return e2m1(tensors["weight_packed"], scale) * whole
    if group["format"] == "mxfp4-pack-quantized":
        return e2m1(tensors["weight_packed"], e8m0(scale))
    if group["format"] == "pack-quantized":
        return _pack_quantized(tensors, weights)
    if weights["strategy"] == "block":
        return by_block(tensors["weight"], scale, weights["block_structure"])
    return by_channel(tensors["weight"], scale)


def _pack_quantized(tensors: Arrays, weights: Mapping[str, Any]) -> np.ndarray:
    """Words along K hold q + 8; zero points are packed along N, with 8 added as well."""
    bits = weights["num_bits"]
    N, K = tensors["weight_shape"]
    codes = unpack(tensors["weight_packed"], bits)[:, :K]
    group = _group_of_row(int(K), weights["group_size"])
    if weights["symmetric"]:
        zeros = np.full((int(N), 1), 2 ** (bits - 1))[:, np.zeros_like(group)]
    else:
        packed = tensors["weight_zero_point"]
        zeros = unpack(np.ascontiguousarray(packed.T), bits).T[: int(N)][:, group]
    return (codes - zeros).astype(F32) * tensors["weight_scale"][:, group]


def _group_of_row(K: int, group_size: int) -> np.ndarray:
    """Group of every input feature when groups are in order."""
    return np.arange(K) // (K if group_size == -1 else group_size)
