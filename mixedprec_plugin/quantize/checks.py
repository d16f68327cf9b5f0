"""What a weight and its stored tensors must be; every refusal names the tensor and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch

from mixedprec_plugin.errors import Problem, ShapeError

_OTHER_METHOD = "check that the layer is stored by this method"


def refuse(where: str, what: str, remedy: str, rule: str) -> NoReturn:
    """Raise the `ShapeError` of one problem.

    Args:
        where: tensor suffix (`weight`, `qzeros`); callers that know the layer put its name before.
    """
    raise ShapeError(Problem(where, what, remedy, rule))


def weight_shape(weight: torch.Tensor) -> tuple[int, int]:
    """Return (N, K) of a weight that can be quantized.

    Raises:
        ShapeError: the weight is not a non-empty matrix of a floating dtype of 16 bits or more.
    """
    if weight.dim() != 2 or weight.numel() == 0:
        what = f"shape {list(weight.shape)} (expected a non-empty [N, K] matrix)"
        refuse("weight", what, "quantize each expert or shard by itself", "weight-shape")
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        what = f"dtype {weight.dtype} (expected float16, bfloat16 or float32)"
        refuse("weight", what, "dequantize the layer before it is quantized again", "weight-dtype")
    N, K = weight.shape
    return N, K


def resolve_group_size(K: int, group_size: int, pack_factor: int) -> int:
    """Return how many elements along K share a scale, with -1 resolved to K.

    Args:
        pack_factor: codes of an int32 word along K; 1 where words run along N.
    Raises:
        ShapeError: the group size does not divide K, or the words do not.
    """
    resolved = K if group_size == -1 else group_size
    if resolved < 1 or K % resolved:
        fitting = [str(size) for size in (128, 64, 32) if K % size == 0]
        what = f"group size {group_size} does not divide K = {K} (expected a divisor of K, or -1)"
        remedy = f"use group_size {', '.join([*fitting, '-1'])}, or keep this layer in bf16"
        refuse("weight", what, remedy, "group-size")
    require_packable(K, pack_factor, "K")
    return resolved


def require_packable(size: int, pack_factor: int, name: str = "N") -> None:
    """Check that codes packed along a dimension fill whole words.

    Raises:
        ShapeError: its size is not a multiple of the pack factor.
    """
    if size % pack_factor:
        what = f"{name} = {size} does not fill int32 words (expected a multiple of {pack_factor})"
        refuse("weight", what, "keep this layer in bf16", "pack-factor")


def require_finite(scales: torch.Tensor, weight: torch.Tensor) -> None:
    """Check the scales that a weight led to; a weight that is not finite shows in its scales.

    Args:
        scales: the scales made from `weight`, in the dtype that they are stored in.
        weight: [N, K]; read again only if a scale is not finite.
    Raises:
        ShapeError: the weight holds NaN or Inf (how many, and the first place), or is finite and
            too large for scales of this dtype.
    """
    if bool(torch.isfinite(scales).all()):
        return
    bad = ~torch.isfinite(weight)
    if count := int(bad.sum()):
        row, column = divmod(int(bad.flatten().byte().argmax()), weight.shape[1])
        what = (
            f"{count} of {weight.numel()} values are not finite, the first "
            f"{weight[row, column].item()!r} at [{row}, {column}] (expected finite values)"
        )
        remedy = "check the checkpoint's file, or keep this layer in bf16"
        refuse("weight", what, remedy, "not-finite")
    what = (
        f"values as large as {weight.abs().amax().item():.6g} need scales beyond "
        f"{torch.finfo(scales.dtype).max:.6g}, the largest {scales.dtype}"
    )
    remedy = "run the model in bfloat16, or keep this layer unquantized"
    refuse("weight", what, remedy, "scale-overflow")


def take(tensors: Mapping[str, torch.Tensor], suffix: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a stored tensor after checking that it is there and has the shape it must have.

    Raises:
        ShapeError: the tensor is missing or has another shape.
    """
    if suffix not in tensors:
        what = f"missing (expected shape {list(shape)}; got {', '.join(sorted(tensors))})"
        refuse(suffix, what, _OTHER_METHOD, "tensor-missing")
    tensor = tensors[suffix]
    if tuple(tensor.shape) != shape:
        what = f"shape {list(tensor.shape)} (expected {list(shape)})"
        remedy = "check the method's arguments against the checkpoint"
        refuse(suffix, what, remedy, "tensor-shape")
    return tensor


def take_one(tensors: Mapping[str, torch.Tensor], suffix: str) -> torch.Tensor:
    """Return a stored number, stored as [] or [1], as float32 [].

    Raises:
        ShapeError: it is missing or has another shape.
    """
    is_vector = suffix in tensors and tensors[suffix].dim() == 1
    return take(tensors, suffix, (1,) if is_vector else ()).float().reshape(())


def take_matrix(
    tensors: Mapping[str, torch.Tensor], suffix: str, dtype: torch.dtype, layout: str
) -> torch.Tensor:
    """Return a stored matrix after checking its dtype; its shape tells N and K.

    Args:
        layout: its shape for the message, such as `[K, N/8]`.
    Raises:
        ShapeError: it is missing, no matrix, or of another dtype.
    """
    tensor = tensors.get(suffix)
    if tensor is None or tensor.dim() != 2 or tensor.dtype != dtype:
        found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        refuse(suffix, f"{found} (expected {dtype} {layout})", _OTHER_METHOD, "tensor-dtype")
    return tensor
