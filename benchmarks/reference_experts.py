"""The experts of a transformers layer, each with the weights of its own scheme.

transformers keeps all experts of a layer in one parameter, which holds one dtype; here each expert
is three projections. SGLang's kernels for FP8 per tensor differ from the linear ones: gate and up
projection share a scale, and all rows that are multiplied share one scale of activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.activations import FP8_MAX, QuantizedInputLinear
from benchmarks.reference_layers import Tensors, reference_linear
from mixedprec_plugin.families.names import ExpertShard
from mixedprec_plugin.plan.model import PlannedLayer


@dataclasses.dataclass(frozen=True)
class Projection:
    """A projection of an expert.

    Attributes:
        module: computes it; None for FP8 per tensor.
        codes: [N, K] float32, and `scale` []: of FP8 per tensor.
    """

    module: torch.nn.Module | None
    codes: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    scale: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))


class ReferenceExperts(torch.nn.Module):
    """The experts of one layer.

    Source of the roundings: SGLang's fused_moe_kernel multiplies an expert's down projection by
    the router's weight in float32 and rounds once; moe_sum adds a token's experts in float32.
    Marlin rounds MXFP4's down projection, and the router's weight, before it multiplies them
    (kernels/jit/csrc/gemm/marlin_moe/marlin_template.h, `sh_block_topk_weights`, 0.5.23).

    Args:
        experts: what transformers built; its activation function is used.
        num_ranks: tensor-parallel ranks. Each has a part of the intermediate, and FP8 per tensor
            gives each part a scale of its own.
    """

    def __init__(self, experts: Any, num_ranks: int = 1) -> None:
        super().__init__()
        self.num_ranks = num_ranks
        self.activation: Callable[[torch.Tensor], torch.Tensor] = experts.act_fn
        self.projections: list[dict[str, Projection]] = [{} for _ in range(experts.num_experts)]
        self._rounded_before: set[int] = set()

    def put(self, layer: PlannedLayer, tensors: Tensors) -> None:
        """Set one projection.

        Args:
            layer: one projection of one expert.
            tensors: as it is served.
        """
        assert isinstance(layer.shard, ExpertShard)
        arguments = layer.scheme.arguments if layer.scheme is not None else {}
        if layer.method == "fp8" and arguments["weight_block_size"] is None:
            codes, scale = tensors["weight"].float(), tensors["weight_scale"].float()
            projection = Projection(None, codes, scale.reshape(()))
        else:
            module = reference_linear(layer, tensors)
            # a rank has a part of the intermediate, and gives it scales of its own
            if layer.method in ("fp8_channel", "int8_channel") and layer.shard.projection == "w2":
                assert isinstance(module, QuantizedInputLinear)
                projection = Projection(_SplitLinear(module, self.num_ranks))
            else:
                projection = Projection(module)
        self.projections[layer.shard.expert][layer.shard.projection] = projection
        if layer.method == "mxfp4":
            self._rounded_before.add(layer.shard.expert)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H], ids [T, k] and weights [T, k] to [T, H] in the dtype of the input."""
        dtype = hidden_states.dtype
        total = torch.zeros(hidden_states.shape)
        places = [torch.where(top_k_index == expert) for expert in range(len(self.projections))]
        outputs = self._outputs(hidden_states, [tokens for tokens, _ in places])
        for expert, ((tokens, choices), out) in enumerate(zip(places, outputs, strict=True)):
            weights = top_k_weights[tokens, choices, None]
            if expert in self._rounded_before:
                out, weights = out.to(dtype), weights.to(dtype)
            weighted = out.float() * weights.float()
            total.index_add_(0, tokens, weighted.to(dtype).float())
        return total.to(dtype)

    def _outputs(self, x: torch.Tensor, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """Output of each expert for its rows, float32 where it is not rounded yet."""
        outputs = [torch.empty(0, x.shape[1])] * len(rows)
        is_fp8 = [bool(p) and p["w1"].module is None for p in self.projections]
        codes, scale = _fp8(x.float())
        inner: dict[int, torch.Tensor] = {}
        for expert, tokens in enumerate(rows):
            if not len(tokens):
                continue
            parts = self.projections[expert]
            if is_fp8[expert]:
                gate, up = _gate_up(parts, codes[tokens], scale)
                inner[expert] = self._activate(gate.to(x.dtype), up.to(x.dtype))
                continue
            modules = {name: part.module for name, part in parts.items()}
            assert all(modules.values())
            gate, up = modules["w1"](x[tokens]), modules["w3"](x[tokens])  # type: ignore[misc]
            outputs[expert] = modules["w2"](self._activate(gate, up).float())  # type: ignore[misc]
        if inner:
            sizes = [len(rows[expert]) for expert in inner]
            parts_of_ranks = torch.cat(list(inner.values())).float().chunk(self.num_ranks, dim=1)
            for rank, part in enumerate(parts_of_ranks):
                codes, scale = _fp8(part)
                for expert, piece in zip(inner, torch.split(codes, sizes), strict=True):
                    down = self.projections[expert]["w2"]
                    weight = down.codes.chunk(self.num_ranks, dim=1)[rank]
                    product = (piece @ weight.T) * scale * down.scale
                    outputs[expert] = product if not rank else outputs[expert] + product
        return outputs

    def _activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (self.activation(gate.float()) * up.float()).to(gate.dtype)


class _SplitLinear(torch.nn.Module):
    """A layer whose input is quantized in as many parts as there are ranks."""

    def __init__(self, whole: QuantizedInputLinear, num_ranks: int) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(
            QuantizedInputLinear(
                codes,
                whole.get_buffer("scales"),
                None,
                whole.quantize_input,
                joins_scales=whole.joins_scales,
            )
            for codes in whole.get_buffer("codes").chunk(num_ranks, dim=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] float32 -> [T, N]."""
        parts = zip(self.parts, x.chunk(len(self.parts), dim=1), strict=True)
        return torch.stack([part(piece) for part, piece in parts]).sum(0)


def split_experts(model: Any, block: str, num_ranks: int = 1) -> ReferenceExperts:
    """Replace the experts of a block of a transformers model, in place.

    Args:
        block: name of the module whose `experts` they are.
        num_ranks: tensor-parallel ranks of the engine.
    Returns:
        the experts, whose projections are still to be put.
    """
    parent = model.get_submodule(block)
    parent.experts = ReferenceExperts(parent.experts, num_ranks)
    made: ReferenceExperts = parent.experts
    return made


def _gate_up(
    parts: dict[str, Projection], codes: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Products with the gate and up projection, requantized to the greater of their scales.

    Source: SGLang's fp8.py:2708 (through float16, as `per_tensor_dequantize` gives it).
    """
    greater = torch.maximum(parts["w1"].scale, parts["w3"].scale)
    products = []
    for name in ("w1", "w3"):
        weight = (parts[name].codes.half() * parts[name].scale).half().float()
        again = _round(weight * (1 / greater))
        products.append((codes @ again.T) * scale * greater)
    return products[0], products[1]


def _fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [R, K] and one scale [] for all rows."""
    scale = x.abs().amax() / FP8_MAX
    return _round(x * (1 / scale)), scale


def _round(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
