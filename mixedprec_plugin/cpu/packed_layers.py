"""Layers and experts of few bits on the CPU: SGLang's weights and loaders, torch matmuls.

SGLang's method runs a scheme, which creates the weights, repacks and multiplies; so do these. While
they are served, the checkpoint's words give way to the layout of torch's kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import (
    StandardCombineInput,
    StandardDispatchOutput,
)
from sglang.srt.layers.quantization.base_config import QuantizeMethodBase
from sglang.srt.layers.quantization.base_scheme import BaseLinearScheme, BaseMoEScheme

from mixedprec_plugin.cpu.config import CpuConfig
from mixedprec_plugin.cpu.experts import Product, Rows, check_experts, run_layer, weigh
from mixedprec_plugin.cpu.heap import trim_heap
from mixedprec_plugin.cpu.linear import multiply_rows
from mixedprec_plugin.cpu.packed import Int4Weight, Int8Weight, dequantize, multiply

PackedWeight = Int4Weight | Int8Weight
# suffix -> a stored tensor of one weight
Stored = Mapping[str, torch.Tensor]


class ReloadableMethod(QuantizeMethodBase):
    """Makes a method of SGLang's that runs a scheme one that can be loaded again.

    The method's class has the name of SGLang's: linear layers choose their weight loader by it
    (sglang/srt/layers/linear.py:140).
    """

    def restore_weights_before_loading(self, layer: LinearBase | FusedMoE) -> None:
        """Give the parameters the checkpoint's layout again; their values stay."""
        layer.scheme.restore_weights_before_loading(layer)


class PackedScheme:
    """The weights of a layer, or those of its experts.

    Attributes:
        parts: what the names of the parameters begin with, for each weight or stack of weights.
    """

    parts: tuple[str, ...]

    def __init__(self, quant_config: Any) -> None:
        # not the constructor of SGLang's scheme: it asks for the card, and its kernel needs one
        self.quant_config = quant_config
        self.kernel = SimpleNamespace()
        self._packed: dict[str, list[PackedWeight] | None] = {}
        self._orders: dict[str, list[torch.Tensor | None]] = {}

    def read(self, words: torch.Tensor, rows: slice) -> torch.Tensor:
        """Codes of some rows, uint8 [rows, K], out of the words of one weight."""
        raise NotImplementedError

    def write(self, codes: torch.Tensor) -> torch.Tensor:
        """Undo `read` for all rows."""
        raise NotImplementedError

    def zero_points(self, stored: Stored) -> torch.Tensor | int:
        """Zero points of one weight, uint8 [N, K/G], or one for all."""
        raise NotImplementedError

    @property
    def has_order(self) -> bool:
        """Whether `g_idx` says which group a column belongs to."""
        return bool(getattr(self.quant_config, "desc_act", False))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the words by a layout that is fast here, where groups are runs of K.

        With act order the columns are sorted by group, and the activations as they come.
        """
        for part in self.parts:
            if self._packed.get(part) is None:
                self._packed[part] = self._pack(layer, part)
        trim_heap()

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        """Give the words the checkpoint's layout again; does nothing where they have it."""
        for part, weights in self._packed.items():
            if weights is None:
                continue
            words = []
            for weight, order in zip(weights, self._orders[part], strict=True):
                codes = weight.unpack()
                words.append(self.write(codes if order is None else codes[:, order.argsort()]))
            getattr(layer, f"{part}qweight").data = torch.stack(words) if part else words[0]
        self._packed.clear()

    def multiply(
        self, layer: torch.nn.Module, part: str, expert: int, rows: torch.Tensor
    ) -> torch.Tensor:
        """[T, K] -> [T, N]."""
        weights = self._packed.get(part)
        if weights is None:
            return multiply(rows, self._dequantize(_stored(layer, part, expert)))
        order = self._orders[part][expert]
        return weights[expert].multiply(rows if order is None else rows[:, order])

    def _dequantize(self, stored: Stored) -> torch.Tensor:
        """The weight [N, K] from the checkpoint's layout."""
        scales = stored["scales"]
        codes = self.read(stored["qweight"], slice(0, scales.shape[1]))
        zeros = self.zero_points(stored)
        if not self.has_order:
            return dequantize(codes, zeros, scales)
        return codes.to(scales.dtype).sub_(zeros).mul_(scales[stored["g_idx"]].t())

    def _pack(self, layer: torch.nn.Module, part: str) -> list[PackedWeight] | None:
        """Every weight in the new layout; None where nothing was changed."""
        qweight, scales = getattr(layer, f"{part}qweight"), getattr(layer, f"{part}scales")
        num_experts = qweight.shape[0] if part else 1
        orders: list[torch.Tensor | None] = [None] * num_experts
        if self.has_order:
            groups = [_stored(layer, part, expert)["g_idx"] for expert in range(num_experts)]
            if not all(_is_even(own, scales.shape[-2]) for own in groups):
                return None
            orders = [_order(own) for own in groups]
        self._orders[part] = orders

        def pack(expert: int) -> PackedWeight | None:
            return self._pack_one(_stored(layer, part, expert), orders[expert])

        if part:
            return _pack_experts(qweight, scales, pack)
        weight = pack(0)
        if weight is None:
            return None
        qweight.data, scales.data = weight.packed, weight.scales
        return [weight]

    def _pack_one(self, stored: Stored, order: torch.Tensor | None) -> PackedWeight | None:
        def read(rows: slice) -> torch.Tensor:
            codes = self.read(words, rows)
            return codes if order is None else codes[:, order]

        words, scales, bits = stored["qweight"], stored["scales"], self.quant_config.weight_bits
        N = scales.shape[1]
        if bits == 8:
            return Int8Weight.pack(read(slice(0, N)), scales)
        return Int4Weight.pack(read, N, words.numel() * 8 // N, scales, self.zero_points(stored))


class PackedLinear(PackedScheme, BaseLinearScheme):
    """A scheme of linear layers."""

    parts = ("",)

    def apply_weights(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Multiply [..., K] by the weight, [..., N]; the bias is added afterwards."""
        return multiply_rows(partial(self.multiply, layer, "", 0), x, bias)


class PackedExperts(PackedScheme, BaseMoEScheme):
    """A scheme of experts."""

    parts = ("w13_", "w2_")
    preset_name = ""

    def create_weights(self, layer: FusedMoE, *args: Any, **kwargs: Any) -> None:
        """Create SGLang's parameters.

        Raises:
            MethodError, ShapeError: what the CPU platform does not run, or Marlin does not.
        """
        # Marlin's kernels have silu alone
        check_experts(layer, self.preset_name, ("silu",), *self.unit())
        super().create_weights(layer, *args, **kwargs)

    def unit(self) -> tuple[str, tuple[int]]:
        """What must divide the sizes of an expert: its name, and how many elements it is."""
        return "group size", (self.quant_config.group_size,)

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: MoeRunnerConfig) -> None:
        """Keep the config: the loop of `experts.py` needs no runner."""
        self.moe_runner_config = moe_runner_config

    def get_moe_runner_backend(self, layer: FusedMoE) -> None:
        """None: SGLang's name for a method that runs without one of its runners."""

    def apply_weights(
        self, layer: FusedMoE, dispatch_output: StandardDispatchOutput
    ) -> StandardCombineInput:
        """Run the experts, [T, H] -> [T, H]."""
        gate_up, down = (partial(self._prepare, layer, part) for part in self.parts)
        return run_layer(layer, dispatch_output, self.moe_runner_config, gate_up, down)

    def _prepare(self, layer: FusedMoE, part: str, x: torch.Tensor) -> Product:
        """Make ready activations [R, K], which are not quantized.

        The router weight is rounded to the activation's dtype and multiplies the rounded product,
        as in the Marlin kernel (marlin_moe/marlin_template.h:582, 1719). On the first product
        Marlin has none, and Triton's kernel multiplies in float32.
        """
        is_early = self.moe_runner_config.apply_router_weight_on_input

        def run(expert: int, rows: Rows, router_weights: torch.Tensor | None) -> torch.Tensor:
            product = self.multiply(layer, part, expert, x[rows])
            if router_weights is None:
                return product
            if is_early:
                return weigh(product, router_weights, x.dtype)
            return product * router_weights.to(x.dtype).unsqueeze(1)

        return run


class PackedConfig(CpuConfig):
    """A config of the CPU platform whose methods run schemes."""

    schemes: tuple[type[PackedLinear], type[PackedExperts]]

    def get_linear_scheme(self, layer: LinearBase) -> PackedLinear:
        return self.schemes[0](self)

    def get_moe_scheme(self, layer: FusedMoE) -> PackedExperts:
        return self.schemes[1](self)


def _stored(layer: torch.nn.Module, part: str, expert: int) -> dict[str, torch.Tensor]:
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    found = {suffix: getattr(layer, part + suffix, None) for suffix in suffixes}
    return {
        suffix: parameter.data[expert] if part else parameter.data
        for suffix, parameter in found.items()
        if parameter is not None
    }


def _is_even(groups: torch.Tensor, num_groups: int) -> bool:
    """Whether all groups of [K] have equally many columns."""
    length, rest = divmod(groups.numel(), num_groups)
    counts = torch.bincount(groups, minlength=num_groups)
    return rest == 0 and bool((counts == length).all())


def _order(groups: torch.Tensor) -> torch.Tensor | None:
    """Columns sorted by group, int64 [K]; None where they are."""
    order = groups.argsort(stable=True)
    return None if torch.equal(groups, groups[order]) else order


def _pack_experts(
    qweight: torch.nn.Parameter,
    scales: torch.nn.Parameter,
    pack: Callable[[int], PackedWeight | None],
) -> list[PackedWeight] | None:
    """Replace the stored words of all experts by a layout that is fast here.

    Args:
        qweight: int32 [E, ...]; afterwards it holds the packed weights [E, N, K * bits / 8].
        scales: [E, K/G, N]; afterwards it may be a view of what the kernel reads.
        pack: expert -> its packed weight, None where the layout does not take the shape.
    Returns:
        every expert's weight, or None where nothing was changed.
    """
    weights: list[PackedWeight] = []
    stacks: dict[str, torch.Tensor] = {}
    for expert in range(qweight.shape[0]):
        weight: Any = pack(expert)
        if weight is None:
            return None
        tensors = {"packed": weight.packed}
        if isinstance(weight, Int4Weight):
            tensors["pairs"] = weight.pairs
        for name, tensor in tensors.items():
            if name not in stacks:
                stacks[name] = tensor.new_empty(qweight.shape[0], *tensor.shape)
            tensors[name] = stacks[name][expert].copy_(tensor)
        if isinstance(weight, Int4Weight) and len(weight.pairs) == len(weight.scales):
            tensors["scales"] = tensors["pairs"][..., 0]
        weights.append(dataclasses.replace(weight, **tensors))
    qweight.data = stacks["packed"]
    if "pairs" in stacks and stacks["pairs"].shape[1] == scales.shape[1]:
        scales.data = stacks["pairs"][..., 0]
    return weights
