"""The method of a layer of experts: SGLang's own where they share a scheme, else a composite."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.moe import MoeRunnerConfig
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.standard import (
    StandardCombineInput,
    StandardDispatchOutput,
)
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.moe.utils import get_moe_a2a_backend, get_moe_runner_backend
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.platforms import current_platform

from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.experts.groups import ExpertGroup, check_groups, groups_within
from mixedprec_plugin.experts.launch import backend_fault
from mixedprec_plugin.experts.loading import OWNERS
from mixedprec_plugin.methods.construct import offered, repaired

# SGLang's runners on CUDA that can return every choice's output
_UNSUMMED_BACKENDS = ("triton", "marlin")
# where a composite layer keeps its children, and their table of ids
_GROUPS, _TABLE = "expert_groups", "expert_table"


def experts_method(
    layer: FusedMoE, prefix: str, groups: Sequence[ExpertGroup]
) -> FusedMoEMethodBase | None:
    """Choose the method of a layer of experts while SGLang builds it.

    Args:
        groups: one for each scheme; together they hold every expert once.
    Returns:
        for one group what its config gives, repaired where its method knows a cure, None where it
        is unquantized; for several a composite.
    Raises:
        LoadError: the groups do not hold every expert once, or SGLang would leave a quantized
            group unquantized.
    """
    check_groups(prefix, groups, layer.num_experts)
    groups = [dataclasses.replace(g, config=repaired(g.config, [g.method])) for g in groups]
    if len(groups) > 1:
        return CompositeMoEMethod(groups)
    config = groups[0].config
    if config is None:
        said = layer.moe_runner_config
        # SGLang's own has rows of gate and up in turn on a CPU (fused_moe_native.py:134)
        is_scaled = said.activation == "silu" and said.gemm1_alpha is not None
        return _cpu_method(groups[0]) if is_scaled else None
    method: FusedMoEMethodBase | None = config.get_quant_method(layer, prefix)
    if method is None or isinstance(method, UnquantizedFusedMoEMethod):
        what = f"SGLang would leave the experts unquantized, not in {groups[0].label}"
        raise LoadError(Problem(prefix, what, rule="left-unquantized"))
    return method


class CompositeMoEMethod(FusedMoEMethodBase):
    """Runs every group of experts in a child layer of its own, and sums what they give.

    A child is a real `FusedMoE` with SGLang's own method of its scheme. Ids of other groups'
    experts are -1 there, as other ranks' are under expert parallelism: SGLang's kernels skip them.
    A child counts its own experts alone (`num_experts == num_local_experts`), and so its kernels
    write zeros to masked rows of the intermediate; under expert parallelism they leave rubbish, of
    which FP8 per tensor would take the greatest magnitude.

    Under expert parallelism a rank has children for the groups that its own experts are in, which
    differ from rank to rank; SGLang's dispatcher hands it its own ids, and sums over ranks.
    """

    runner = None

    def __init__(self, groups: Sequence[ExpertGroup]) -> None:
        self.groups = tuple(groups)

    def create_weights(
        self,
        layer: FusedMoE,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        *,
        moe_intermediate_size: int,
        **_: Any,
    ) -> None:
        """Build the children.

        Raises:
            LoadError: the layer is used in a way that a composite cannot serve.
            MethodError, ShapeError: as the groups' methods raise.
        """
        _check_layer(layer, self.groups)
        first = layer.moe_ep_rank * num_experts
        groups = groups_within(self.groups, range(first, first + num_experts))
        with _without_expert_parallelism(layer):
            children = torch.nn.ModuleList(
                _build_child(layer, group, index, params_dtype, moe_intermediate_size)
                for index, group in enumerate(groups)
            )
        layer.add_module(_GROUPS, children)
        owners: dict[int, tuple[torch.nn.Module, int]] = {}
        # -1 for experts of other groups, and in the last column, where a masked id of -1 reads
        table = [[-1] * (num_experts + 1) for _ in groups]
        for child, group, row in zip(children, groups, table, strict=True):
            for local, expert in enumerate(group.ids):
                owners[expert] = child, local
                row[expert - first] = local
        setattr(layer, OWNERS, owners)
        # int32 [groups, E + 1]
        layer.register_buffer(_TABLE, torch.tensor(table, dtype=torch.int32), persistent=False)

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: MoeRunnerConfig) -> None:
        """Keep the config: the children have runners of their own."""
        self.moe_runner_config = moe_runner_config

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        """Nothing: SGLang visits the children, which are modules of the model."""

    def apply(
        self, layer: FusedMoE, dispatch_output: StandardDispatchOutput
    ) -> StandardCombineInput:
        """Run the groups, [T, H] -> [T, H].

        A child returns every choice's output, rounded as its kernel does, foreign ones as zeros.
        They are summed in float32 and rounded once, which is what SGLang does with the choices of
        a layer of one method: the result differs by the order of the sum alone. Where a child's
        method cannot return single choices, it sums and rounds its own first.

        Raises:
            LoadError: the router's output is in a form of a backend of its own.
        """
        topk_output = dispatch_output.topk_output
        if not TopKOutputChecker.format_is_standard(topk_output):
            given = type(topk_output).__name__
            what = f"the router gives a {given} (expected a StandardTopKOutput)"
            raise LoadError(Problem(layer.layer_name, what, "start without --moe-runner-backend"))
        local_ids = getattr(layer, _TABLE)[:, topk_output.topk_ids]
        total: torch.Tensor | None = None
        for child, ids in zip(getattr(layer, _GROUPS), local_ids, strict=True):
            part = _run_child(child, dispatch_output, ids)
            total = part if total is None else total.add_(part)
        assert total is not None
        factor = self.moe_runner_config.routed_scaling_factor
        # SGLang's runners multiply by it on CUDA; elsewhere its models do (deepseek_v2.py:1233)
        if factor not in (None, 1.0) and total.is_cuda:
            total.mul_(factor)
        return StandardCombineInput(hidden_states=total.to(dispatch_output.hidden_states.dtype))


def _run_child(
    child: FusedMoE, dispatch_output: StandardDispatchOutput, ids: torch.Tensor
) -> torch.Tensor:
    """One group's part, float32 [T, H]."""
    topk_output = dispatch_output.topk_output._replace(topk_ids=ids)
    own = StandardDispatchOutput(dispatch_output.hidden_states, None, topk_output)
    out: torch.Tensor = child.run_moe_core(own).hidden_states
    return out.sum(1, dtype=torch.float32) if out.dim() == 3 else out.float()


def _without_expert_parallelism(layer: FusedMoE) -> AbstractContextManager[Any]:
    """Build layers that hold all of their experts on a rank of expert parallelism."""
    if layer.moe_ep_size == 1:
        return contextlib.nullcontext()
    from sglang.srt.runtime_context import get_parallel

    ranks = get_parallel()
    # a child sends nothing: the layer sums over ranks
    alone = SimpleNamespace(world_size=1, rank_in_group=0)
    found: AbstractContextManager[Any] = ranks.override(
        moe_ep_size=1, moe_ep_rank=0, moe_ep_group=alone,
        moe_dp_size=ranks.moe_dp_size * ranks.moe_ep_size,
    )  # fmt: skip
    return found


def _build_child(
    layer: FusedMoE,
    group: ExpertGroup,
    index: int,
    params_dtype: torch.dtype,
    intermediate_size: int,
) -> FusedMoE:
    """The layer that holds and runs one group; a rank's part of it, as of the whole."""
    config = layer.moe_runner_config
    child = FusedMoE(
        num_experts=len(group.ids),
        hidden_size=layer.hidden_size,
        intermediate_size=intermediate_size,
        layer_id=layer.layer_id,
        top_k=layer.top_k,
        params_dtype=params_dtype,
        quant_config=group.config,
        prefix=f"{layer.layer_name}.{_GROUPS}.{index}",
        activation=config.activation,
        apply_router_weight_on_input=config.apply_router_weight_on_input,
        use_presharded_weights=layer.use_presharded_weights,
        # the next group reads the same hidden states
        inplace=False,
        gemm1_alpha=config.gemm1_alpha,
        gemm1_beta=config.gemm1_beta,
        gemm1_clamp_limit=config.gemm1_clamp_limit,
        swiglu_limit=config.swiglu_limit,
        with_bias=layer.with_bias,
        routing_method_type=config.routing_method_type,
        is_gated=config.is_gated,
        gate_up_interleaved=config.gate_up_interleaved,
        quant_method=_cpu_method(group) if group.config is None else None,
        uses_expert_location=False,
    )
    is_unquantized = isinstance(child.quant_method, UnquantizedFusedMoEMethod)
    if group.config is not None and is_unquantized:
        ids = ", ".join(map(str, group.ids))
        what = f"SGLang would leave experts {ids} unquantized, not in {group.label}"
        raise LoadError(Problem(layer.layer_name, what, rule="left-unquantized"))
    if _can_leave_unsummed(child, group.method):
        child.moe_runner_config.no_combine = True
        child.moe_runner_config.no_combine_keep_router_weight = True
    return child


def _cpu_method(group: ExpertGroup) -> FusedMoEMethodBase | None:
    """The CPU platform's own method for unquantized experts; None on CUDA, which needs none."""
    if current_platform.device_type != "cpu":
        return None
    method: FusedMoEMethodBase = offered(group.method, "CPU_EXPERTS")()
    return method


def _can_leave_unsummed(child: FusedMoE, method: str) -> bool:
    """Whether a child can return the weighted output of every choice."""
    fields = {field.name for field in dataclasses.fields(MoeRunnerConfig)}
    # SGLang 0.5.21 has it not
    if "no_combine_keep_router_weight" not in fields:
        return False
    if not isinstance(child.quant_method, offered(method, "UNSUMMED_EXPERTS", ())):
        return False
    if child.runner_backend is None:
        return bool(current_platform.device_type == "cpu")
    return child.runner_backend.value in _UNSUMMED_BACKENDS


def _check_layer(layer: FusedMoE, groups: Sequence[ExpertGroup]) -> None:
    """Refuse uses of a layer that only its own parameters, or one method, could serve."""
    methods = {group.method for group in groups}
    backend = backend_fault(get_moe_runner_backend().value, methods)
    dispatcher = get_moe_a2a_backend().value
    faults = (
        (backend != "", backend, "start without --moe-runner-backend"),
        (
            dispatcher != "none",
            f"--moe-a2a-backend {dispatcher!r} needs all experts of a layer in one scheme",
            "start without it",
        ),
        (
            layer.num_fused_shared_experts > 0,
            "shared experts cannot be fused into routed ones of several schemes",
            "start with --disable-shared-experts-fusion",
        ),
        (
            layer.moe_runner_config.no_combine,
            "the model wants the experts' outputs apart, which several schemes do not give",
            "give all experts of the layer one scheme",
        ),
    )
    problems = [
        Problem(layer.layer_name, what, remedy, "composite")
        for found, what, remedy in faults
        if found
    ]
    if problems:
        raise LoadError(problems)
