"""Tensors of single experts -> the parameters that hold them, and what one fills under `auto`."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.utils import get_moe_runner_backend

from mixedprec_plugin.errors import LoadError, Problem

# where a composite layer says which of its children holds an expert: id -> (child, local id)
OWNERS = "expert_owners"
# what SGLang holds as floats and gives to no kernel: gptq_moe.py:254, and of compressed-tensors
_UNREAD = ("weight_shape", "qzeros")
_FLOAT_CODES = (torch.float8_e4m3fn, torch.float8_e5m2)
_BIAS = "bias"
# that run a scaled gate above up
_APART = ("auto", "triton", "marlin")


def keep_apart(layer: FusedMoE) -> None:
    """Tell SGLang that gate lies above up, as single projections are placed, while it builds.

    A layer whose gate is scaled, as gpt-oss's, has their rows in turn unless it says otherwise
    (quantization/mxfp4.py:662, moe_runner/triton_utils/fused_moe.py:747).

    Raises:
        LoadError: this release of SGLang, or the backend that was asked for, knows no other order.
    """
    config, backend = layer.moe_runner_config, get_moe_runner_backend().value
    if config.gemm1_alpha is None or not getattr(config, "gate_up_interleaved", True):
        return
    if not hasattr(config, "gate_up_interleaved"):
        what = "this release of SGLang runs its gate and up with their rows in turn alone"
        raise LoadError(Problem(layer.layer_name, what, "use SGLang 0.5.23", "experts-form"))
    if backend not in _APART:
        what = f"--moe-runner-backend {backend!r} needs its rows of gate and up in turn"
        remedy = "start without --moe-runner-backend"
        raise LoadError(Problem(layer.layer_name, what, remedy, "experts-form"))
    config.gate_up_interleaved = False


def load_expert_tensor(
    layer: FusedMoE, expert: int, shard: str, suffix: str, tensor: torch.Tensor
) -> None:
    """Hand one tensor of one expert to its parameter's own loader; not where other ranks hold it.

    Args:
        shard: `w1` (gate), `w3` (up) or `w2` (down projection).
        suffix: the parameter's, such as `weight_scale_inv`.
        tensor: the whole tensor; SGLang's loader takes the rank's part.
    Raises:
        LoadError: the expert's scheme has no such parameter.
    """
    owners = getattr(layer, OWNERS, None)
    if owners is not None and expert not in owners:
        return
    owner, local = (layer, expert) if owners is None else owners[expert]
    name = _parameter_name(shard, suffix)
    parameter = _parameter(layer, owner, expert, name)
    if suffix == _BIAS and shard == "w2":
        _load_output_bias(owner, parameter, local, tensor)
        return
    loader = parameter.weight_loader
    # gpt-oss's model asks for the one that takes all experts at once (models/gpt_oss.py:237)
    loader = owner.weight_loader if loader == owner.weight_loader_fused else loader
    loader(parameter, tensor, f"{layer.layer_name}.{name}", shard, local)


def _parameter_name(shard: str, suffix: str) -> str:
    name = "weight_bias" if suffix == _BIAS else suffix
    return ("w2_" if shard == "w2" else "w13_") + name


def _load_output_bias(
    owner: FusedMoE, parameter: torch.nn.Parameter, expert: int, bias: torch.Tensor
) -> None:
    """Add it on one rank of those whose outputs are summed; SGLang's loader looks for a matrix.

    Source: `_load_mxfp4_experts_weights` (models/gpt_oss.py:1125).
    """
    place = owner._map_global_expert_id_to_local_expert_id(expert)
    if place >= 0:
        parameter.data[place].copy_(bias if owner.moe_tp_rank == 0 else torch.zeros_like(bias))


def _parameter(layer: FusedMoE, owner: FusedMoE, expert: int, name: str) -> Any:
    # not named_parameters(): it would list them all for every tensor of every expert
    parameter = getattr(owner, name, None)
    if not isinstance(parameter, torch.nn.Parameter):
        names = ", ".join(own for own, _ in owner.named_parameters())
        method = type(owner.quant_method).__name__
        what = f"has no parameter {name!r} in {method} (expected {names})"
        remedy = "the tensor belongs to another scheme than the expert's"
        where = f"{layer.layer_name}: expert {expert}"
        raise LoadError(Problem(where, what, remedy, "unknown-parameter"))
    return parameter


def check_expert_part(
    layer: FusedMoE, where: str, shard: str, suffix: str, tensor: torch.Tensor
) -> None:
    """Check that a tensor is as large as what it fills, and codes of the same kind.

    SGLang's loader cuts a tensor that is too long, pads a short one with zeros, and casts any dtype
    (`_load_w13`, `_load_w2`, moe/fused_moe_triton/layer.py:788, 881).

    Args:
        layer: a layer of experts under `auto`, none of a composite.
        suffix: the parameter's, without `w13_` or `w2_`.
        tensor: as it is stored, of one expert.
    Raises:
        LoadError: it would be cut, padded, or cast from codes into something else.
    """
    parameter = getattr(layer, _parameter_name(shard, suffix), None)
    # one without a dimension for experts is a name that the loader passes over (moe_wna16.py:369)
    is_passed_over = isinstance(parameter, torch.Tensor) and parameter.shape == (0,)
    if not isinstance(parameter, torch.Tensor) or is_passed_over:
        return
    if suffix in _UNREAD and parameter.is_floating_point():
        return
    part, tp_size = _part_size(layer, parameter, shard, suffix), layer.moe_tp_size
    size = _size(tensor)
    if is_same_kind(tensor, parameter) and size in (part, part * tp_size):
        return
    held = f"{dtype_name(parameter)} {list(parameter.shape[1:])}"
    ranks = f" on each of {tp_size} ranks" if tp_size > 1 else ""
    what = (
        f"is stored as {dtype_name(tensor)} {list(tensor.shape)}, which does not make up an "
        f"expert's {held} in {type(layer.scheme or layer.quant_method).__name__}{ranks}"
    )
    remedy = "name a method for the experts, or take them from another source"
    raise LoadError(Problem(f"{where}.{suffix}", what, remedy, "auto-part"))


def _part_size(layer: FusedMoE, parameter: torch.Tensor, shard: str, suffix: str) -> int:
    """The size of one projection's share of one expert's part of a parameter."""
    # a scale that SGLang repeats for smaller groups
    repeats = getattr(layer, "group_size_div_factor", 1) if "scales" in suffix else 1
    size = _size(parameter) // max(parameter.shape[0], 1) // repeats
    is_shared = parameter.dim() == 1 or "g_idx" in suffix
    is_pair = shard != "w2" and layer.moe_runner_config.is_gated and not is_shared
    return size // 2 if is_pair else size


def _size(tensor: torch.Tensor) -> int:
    """Elements of floats, whose dtype SGLang may choose; bytes of codes, which it may pack anew."""
    return tensor.numel() * (tensor.element_size() if _are_codes(tensor) else 1)


def _are_codes(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or tensor.dtype in _FLOAT_CODES


def is_same_kind(tensor: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether both are scales, both the same FP8, or both integers."""
    if not (_are_codes(tensor) and _are_codes(parameter)):
        return not (_are_codes(tensor) or _are_codes(parameter))
    is_float = tensor.is_floating_point() or parameter.is_floating_point()
    return not is_float or tensor.dtype == parameter.dtype


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
