"""Runs the experts of one layer one after the other, as SGLang's fused kernels compute them.

Only experts that got tokens run, and a slot whose expert is -1 gives zeros: composite layers mask
other groups' experts so, as expert parallelism does. SGLang's own CPU path cannot take masked ids
(layers/moe/fused_moe_native.py:76).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import (
    StandardCombineInput,
    StandardDispatchOutput,
)
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from torch.nn.functional import gelu, silu

from mixedprec_plugin.cpu.scaled_matmul import block_matmul, channel_matmul
from mixedprec_plugin.errors import MethodError, Problem, ShapeError

Rows = slice | torch.Tensor

# what SGLang's kernels call them -> the gate's function (fused_moe.py:799, 889)
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": functools.partial(gelu, approximate="tanh"),
}


# Activations, ready to be multiplied by any expert's weight: its local id, which rows of them, and
# router weights float32 [t] or None -> [t, N] in their dtype.
Product = Callable[[int, Rows, torch.Tensor | None], torch.Tensor]
Prepare = Callable[[torch.Tensor], Product]


class LoopedExperts(FusedMoEMethodBase):
    """Makes a method of SGLang's for experts one that runs in the loop below.

    Attributes:
        has_biases: whether it adds the experts' biases, and so runs gpt-oss's gate.
    """

    preset_name = ""
    has_biases = False

    def create_weights(self, layer: FusedMoE, *args: Any, **kwargs: Any) -> None:
        """Create SGLang's parameters.

        Raises:
            MethodError, ShapeError: what the CPU platform does not run.
        """
        unit, own = ("block size", self.block_size() or ()), self.has_biases
        check_experts(layer, self.preset_name, ACTIVATIONS, *unit, has_biases=own)
        super().create_weights(layer, *args, **kwargs)

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: MoeRunnerConfig) -> None:
        """Keep the config: the loop needs no runner."""
        self.moe_runner_config = moe_runner_config

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        """Leave the parameters as they were loaded, so that they can be loaded again."""

    def apply(
        self, layer: FusedMoE, dispatch_output: StandardDispatchOutput
    ) -> StandardCombineInput:
        """Run the experts, [T, H] -> [T, H]."""
        gate_up, down = self.prepare(layer)
        return run_layer(layer, dispatch_output, self.moe_runner_config, gate_up, down)

    def block_size(self) -> tuple[int, int] | None:
        """The block, (BN, BK), that shares a scale; None without blocks."""
        return None

    def prepare(self, layer: FusedMoE) -> tuple[Prepare, Prepare]:
        """Activations -> their products with gate and up weights, and with down weights."""
        raise NotImplementedError


def _spans(topk_ids: torch.Tensor) -> list[tuple[int, slice, torch.Tensor]]:
    """Sort slots (token * top_k + choice) by expert; ids below 0 are masked.

    Returns:
        every expert that has slots, its part of all that are sorted so, and its slots int64 [S].
    """
    ids = topk_ids.reshape(-1)
    order = ids.argsort(stable=True)[int((ids < 0).sum()) :]
    counts = torch.bincount(ids[order])
    spans, start = [], 0
    for expert in counts.nonzero().flatten().tolist():
        end = start + int(counts[expert])
        spans.append((expert, slice(start, end), order[start:end]))
        start = end
    return spans


def run_layer(
    layer: FusedMoE,
    dispatch_output: StandardDispatchOutput,
    config: MoeRunnerConfig,
    gate_up: Prepare,
    down: Prepare,
) -> StandardCombineInput:
    """Run the experts of a layer.

    The gate-up product and the activation are each rounded to the activation's dtype, the
    intermediate is quantized anew for the second product. The router weight multiplies the second
    product (the first where `apply_router_weight_on_input`), and the experts of a token are summed
    in float32 and rounded once. `routed_scaling_factor` is left to the model, as in SGLang's CPU
    path: without CUDA models multiply by it themselves (models/deepseek_v2.py:1233).

    Args:
        dispatch_output: hidden states [T, H], router weights float32 and ids [T, top_k].
        gate_up: activations [R, H] -> their products with gate and up weights, [t, 2 I].
        down: activations [R, I] -> their products with down weights, [t, H].
    Returns:
        [T, H]; with `no_combine` [T, top_k, H]. In the dtype of the hidden states.
    Source:
        moe_runner/triton_utils/fused_moe.py, _fused_moe_kernel_sequence.
    """
    x = dispatch_output.hidden_states
    topk_weights, topk_ids, _ = dispatch_output.topk_output
    early, late = _router_weights(topk_weights, config)
    num_tokens, top_k = topk_ids.shape
    spans = _spans(topk_ids)
    out = x.new_zeros(num_tokens * top_k, x.shape[1])
    if spans:
        hidden = x.new_empty(spans[-1][1].stop, layer.intermediate_size_per_partition)
        first = gate_up(x)
        for expert, span, slots in spans:
            pairs = first(expert, slots // top_k, None if early is None else early[slots])
            hidden[span] = _activate(pairs, config)
        second = down(hidden)
        for expert, span, slots in spans:
            out[slots] = second(expert, span, None if late is None else late[slots])
    out = out.view(num_tokens, top_k, x.shape[1])
    if not config.no_combine:
        out = out.sum(1, dtype=torch.float32).to(x.dtype)
    return StandardCombineInput(hidden_states=out)


def weigh(product: torch.Tensor, router_weights: torch.Tensor | None, dtype: Any) -> torch.Tensor:
    """Multiply [t, N] by router weights [t] in float32 and round, as the Triton kernels do."""
    if router_weights is not None:
        product = product * router_weights.float().unsqueeze(1)
    return product.to(dtype)


def prepare_blocks(
    layer: FusedMoE,
    quantize: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
    block_size: tuple[int, int],
) -> tuple[Prepare, Prepare]:
    """Prepare activations for block-quantized experts, gate and up and then down.

    Args:
        layer: holds `w13_weight`, `w2_weight` [E, N, K] and a `..._scale_inv` [E, N/BN, K/BK] each.
        quantize: ([R, K], group size) -> codes [R, K], scales [R, K/G].
        block_size: (BN, BK).
    """

    def prepare(weights: torch.Tensor, grids: torch.Tensor, x: torch.Tensor) -> Product:
        codes, scales = quantize(x, block_size[1])

        def multiply(expert: int, rows: Rows) -> torch.Tensor:
            weight, grid = weights[expert], grids[expert]
            return block_matmul(codes[rows], scales[rows], weight, grid, block_size, torch.float32)

        return weighed(multiply, x.dtype)

    return (
        functools.partial(prepare, layer.w13_weight.data, layer.w13_weight_scale_inv.data),
        functools.partial(prepare, layer.w2_weight.data, layer.w2_weight_scale_inv.data),
    )


def prepare_channels(
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    weights: torch.Tensor,
    channel_scales: torch.Tensor,
    x: torch.Tensor,
) -> Product:
    """Prepare activations for experts in FP8 or INT8 with a scale a channel.

    Args:
        quantize: [R, K] -> codes [R, K], scales [R, 1].
        weights: [E, N, K], float8_e4m3fn or int8.
        channel_scales: float32 [E, N, 1].
    """
    codes, scales = quantize(x)

    def multiply(expert: int, rows: Rows) -> torch.Tensor:
        weight, channels = weights[expert], channel_scales[expert]
        return channel_matmul(codes[rows], scales[rows], weight, channels, torch.float32)

    return weighed(multiply, x.dtype)


def prepare_rows(
    layer: FusedMoE, quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> tuple[Prepare, Prepare]:
    """Prepare activations for experts with a scale a channel, gate and up and then down.

    Args:
        layer: holds `w13_weight`, `w2_weight` [E, N, K] and a `..._scale` [E, N, 1] each.
        quantize: as of `prepare_channels`.
    """
    prepare = functools.partial(prepare_channels, quantize)
    return (
        functools.partial(prepare, layer.w13_weight.data, layer.w13_weight_scale.data),
        functools.partial(prepare, layer.w2_weight.data, layer.w2_weight_scale.data),
    )


def weighed(multiply: Callable[[int, Rows], torch.Tensor], dtype: torch.dtype) -> Product:
    """Make (expert, rows) -> float32 [t, N] a product of activations in a dtype, see `weigh`."""

    def run(expert: int, rows: Rows, router_weights: torch.Tensor | None) -> torch.Tensor:
        return weigh(multiply(expert, rows), router_weights, dtype)

    return run


def _router_weights(
    topk_weights: torch.Tensor, config: MoeRunnerConfig
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The router weights of the first and the second product, [T * top_k]."""
    weights = topk_weights.reshape(-1)
    if config.apply_router_weight_on_input:
        return weights, None
    # a field that SGLang 0.5.21 has not got
    keeps = getattr(config, "no_combine_keep_router_weight", False)
    return None, weights if keeps or not config.no_combine else None


def _activate(pairs: torch.Tensor, config: MoeRunnerConfig) -> torch.Tensor:
    """[t, 2 I] -> [t, I]: in float32, rounded once (silu_and_mul of kernels/jit).

    That of gpt-oss is `swiglu_oai_split` (kernels/ops/activation/minimax_m3_swiglu.py:55).
    """
    gate, up = pairs.float().chunk(2, dim=1)
    alpha, limit = config.gemm1_alpha, config.gemm1_clamp_limit
    if alpha is None:
        return (ACTIVATIONS[config.activation](gate) * up).to(pairs.dtype)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + 1)).to(pairs.dtype)


def expert_biases(layer: FusedMoE) -> list[torch.Tensor | None]:
    """What is added to the products of gate and up, [E, 2 I], and of down, [E, H]."""
    return [getattr(layer, f"{name}_weight_bias", None) for name in ("w13", "w2")]


def check_experts(
    layer: FusedMoE,
    method: str,
    activations: Collection[str],
    unit_name: str,
    units: Collection[int],
    *,
    has_biases: bool = False,
) -> None:
    """Refuse experts that the loop would compute otherwise than CUDA does.

    Args:
        layer: its runner config is set.
        activations: those that the method's kernels run on CUDA.
        units: elements that share a scale; each must divide the hidden and the intermediate size.
        has_biases: whether the loop adds biases, and so runs gpt-oss's gate.
    Raises:
        MethodError, ShapeError: with everything that is not run, or every size that is no multiple.
    """
    config = layer.moe_runner_config
    gate = config.gemm1_alpha, config.gemm1_clamp_limit  # gpt-oss's has both
    is_run = gate == (None, None) or (has_biases and None not in gate)
    unsupported = {
        f"the activation {config.activation!r} (expected {', '.join(activations)})": (
            config.activation not in activations
        ),
        "experts without a gate": not config.is_gated,
        "biases": layer.with_bias and not has_biases,
        "a clamped or scaled gate": not is_run or config.swiglu_limit is not None,
        "shared experts fused into the routed ones": layer.num_fused_shared_experts > 0,
    }
    found = [form for form, present in unsupported.items() if present]
    if found:
        what = f"the CPU platform does not run experts in {method} with {', '.join(found)}"
        remedy = "leave these experts as they are stored, or run on a GPU"
        raise MethodError(Problem(layer.layer_name, what, remedy, "experts-form"))
    sizes = {
        "hidden size": layer.hidden_size,
        "intermediate size a rank": layer.intermediate_size_per_partition,
    }
    remedy = f"give the experts a smaller {unit_name} or another method, or fewer ranks"
    wrong = [
        f"{name} {size} in {method} (expected a multiple of {unit}, the {unit_name})"
        for unit in dict.fromkeys(units)
        for name, size in sizes.items()
        if unit <= 0 or size % unit
    ]
    if wrong:
        raise ShapeError(Problem(layer.layer_name, x, remedy, "experts-shape") for x in wrong)
