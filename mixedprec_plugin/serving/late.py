"""What the plan cannot know: what SGLang's classes say, chose or built.

All that headers, config.json and the target show is decided by the plan, before a start. Here is
the rest, each with the reason why it is not there. (What a pipeline stage has is in `stages`.)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sglang.srt.arg_groups.model_override_base import resolving_view
from sglang.srt.arg_groups.overrides import declare_resolution
from sglang.srt.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
)
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsFusedMoEMethod,
)
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

from mixedprec_plugin.checkpoint.reader import TORCH_DTYPES
from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.families.names import ExpertShard, Shard
from mixedprec_plugin.methods.cards import version
from mixedprec_plugin.methods.construct import cuda_capability
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.methods.shapes import fp8_marlin_fault
from mixedprec_plugin.plan.folding import fold_names, fold_problems
from mixedprec_plugin.plan.heads import DIFFERENT_MODELS, unbuilt_remedy
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.preset.model import Scheme
from mixedprec_plugin.serving.planner import plan_of
from mixedprec_plugin.serving.stages import Stage

_AUTO = "auto"
_CODE = "built-shape"


def keep_auto(args: Any) -> None:
    """Take back a backend that was not asked for and that the experts of the plan cannot run in.

    Not in the plan: SGLang's arguments choose it for a whole model. On compute capability 10.0
    those of Qwen3-MoE and of DeepSeek's family come out with `moe_runner_backend`
    flashinfer_trtllm, by the `quantization_config` of the checkpoint (arg_groups/overrides.py:771,
    arg_groups/model_overrides/qwen3_moe.py:40). AWQ and GPTQ experts run where it is `auto` alone,
    INT8 ones in Triton, and several schemes of a layer where each may choose.

    Args:
        args: resolved ServerArgs with the load format mixedprec, not published yet.
    Raises:
        PresetError, CheckpointError: as for `plan_of`.
    """
    if args.moe_runner_backend != _AUTO:
        return
    chosen = str(resolving_view(args).moe_runner_backend)
    if chosen == _AUTO:
        return
    if os.path.isdir(args.model_path):
        plan = plan_of(args)
        are_run = (
            len(groups) == 1 and chosen in METHODS[groups[0].scheme.method].moe_backends
            for groups in plan.expert_groups.values()
        )
        # the gate of experts with biases runs in Triton's kernels and Marlin's alone
        has_biases = any("bias" in x.outputs for x in plan.layers if x.kind == "expert")
        if all(are_run) and not has_biases:
            return
    declare_resolution(args, "mixedprec", moe_runner_backend=_AUTO)


def check_config(plan: Plan, scheme: Scheme, child: QuantizationConfig) -> None:
    """Ask a config what SGLang asks the one of a whole model (model_loader/loader.py:252).

    Not in the plan: which class reads a source under `auto`, SGLang's own classes decide.

    Raises:
        LoadError: the GPU or the model's dtype is none that it runs on.
    """
    target = plan.target
    found: list[tuple[str, str, str]] = []
    capability = cuda_capability() if target.device == "cuda" else None
    least = child.get_min_capability() if capability is not None else 0
    if capability is not None and capability < least:
        what = (
            f"{scheme.label} does not run on this GPU, whose compute capability is "
            f"{version(capability)} (expected {version(least)} or more)"
        )
        found.append(("min-capability", what, "give the layers another method"))
    dtypes = child.get_supported_act_dtypes()
    if TORCH_DTYPES[target.dtype] not in dtypes:
        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        running = str(TORCH_DTYPES[target.dtype]).removeprefix("torch.")
        what = (
            f"{scheme.label} does not run in {running} with {type(child).__name__} "
            f"(expected {', '.join(names)})"
        )
        found.append(("act-dtype", what, f"start with --dtype {names[0]}"))
    if found:
        layers = [
            layer.name
            for layer in plan.layers
            if layer.scheme is not None and layer.scheme.identity == scheme.identity
        ]
        where = ", ".join(fold_names(layers))
        raise LoadError(Problem(where, what, remedy, rule) for rule, what, remedy in found)


def check_built(plan: Plan, built: Mapping[str, torch.nn.Module], stage: Stage) -> None:
    """Check that the model built every quantized layer, in a shape that its kernel takes.

    Not in the plan: the code of SGLang's model decides which layers it builds, and how large.

    Raises:
        LoadError: a layer that nothing runs, or one of another shape than planned or than this GPU
            takes; all are named.
    """
    problems = [
        Problem(
            layer.name,
            f"is in the checkpoint, but the model builds no {layer.module}",
            unbuilt_remedy(plan, layer.name),
            _CODE,
        )
        for layer in filter(stage.runs, plan.layers)
        if layer.module not in built and not (layer.is_unquantized or layer.kind == "draft")
    ]
    problems = problems or shape_problems(plan, built, stage) or _kernel_problems(built)
    if problems:
        raise LoadError(fold_problems(problems))


def shape_problems(plan: Plan, built: Mapping[str, torch.nn.Module], stage: Stage) -> list[Problem]:
    """Planned linear layers and experts that the model built in another shape."""
    return [
        Problem(layer.name, text, DIFFERENT_MODELS, _CODE)
        for module, own in built.items()
        for layer in filter(stage.runs, plan.modules[module])
        if (text := _difference(layer, own, plan.modules[module]))
    ]


def _kernel_problems(modules: Mapping[str, Any]) -> list[Problem]:
    """What only this GPU refuses: FP8 without FP8 units runs in Marlin kernels, which have tiles.

    The plan refuses it where it knows the GPU and the layer's method; a layer under `auto` is known
    as SGLang built it.

    Source: `Fp8LinearMethod.use_marlin` (fp8.py:518).
    """
    remedy = "give it another method, or use fewer tensor-parallel ranks"
    problems = []
    for name, built in modules.items():
        if isinstance(built, LinearBase) and getattr(built.quant_method, "use_marlin", False):
            N, K = built.output_size_per_partition, built.input_size_per_partition
            if text := fp8_marlin_fault(N, K):
                problems.append(Problem(name, text, remedy, "gpu-shape"))
    return problems


def _difference(layer: PlannedLayer, built: torch.nn.Module, shards: Sequence[PlannedLayer]) -> str:
    assert layer.stored is not None
    stored, whose = (layer.stored.N, layer.stored.K), "its weight is"
    if isinstance(built, FusedMoE):
        if not isinstance(layer.shard, ExpertShard):
            return (
                f"is not a projection of an expert, the model builds {type(built).__name__} for it"
            )
        if layer.shard.expert >= built.num_experts:
            return f"is expert {layer.shard.expert} of a layer with {built.num_experts}"
        expected = built.intermediate_size_per_partition * built.moe_tp_size, built.hidden_size
        expected = expected[::-1] if layer.shard.projection == "w2" else expected
    elif isinstance(built, ParallelLMHead):
        expected = built.org_vocab_size, built.embedding_dim
    else:
        assert isinstance(built, LinearBase)
        expected = _output_size(built, layer.shard), built.input_size
        if isinstance(built, ReplicatedLinear) and layer.shard is not None:
            # it knows nothing of its shards' sizes
            N = sum(shard.stored.N for shard in shards if shard.stored is not None)
            stored, whose = (N, layer.stored.K), f"the weights of {layer.module} are"
    # under `auto` a layer may be stored in a format that we know by name only
    if not (layer.stored.N and layer.stored.K) or expected == stored:
        return ""
    return f"{whose} {list(stored)} (expected {list(expected)} by {type(built).__name__})"


def _output_size(built: LinearBase, shard: Shard) -> int:
    if isinstance(built, QKVParallelLinear) and isinstance(shard, str):
        num_heads = built.total_num_heads if shard == "q" else built.total_num_kv_heads
        head = built.v_head_size if shard == "v" else built.head_size
        return int(num_heads * head)
    if isinstance(built, MergedColumnParallelLinear) and isinstance(shard, int | tuple):
        numbers = shard if isinstance(shard, tuple) else (shard,)
        return sum(int(built.output_sizes[number]) for number in numbers)
    if isinstance(built, QKVParallelLinear):
        heads = built.total_num_heads + built.total_num_kv_heads
        return int(heads * built.head_size + built.total_num_kv_heads * built.v_head_size)
    return int(built.output_size)


def check_reloadable(built: Mapping[str, torch.nn.Module]) -> None:
    """Refuse new weights for layers that have no way to take them, before anything is written.

    Not in the plan: only a loaded layer shows what its method left of its parameters. Some of
    SGLang's methods put their weight in another parameter after it was loaded, and leave its loader
    behind: per-tensor and per-channel FP8 turn it around (fp8.py:1256, w8a8_fp8.py:135).
    A tensor that is copied into a square one would be served transposed, without a word.

    Raises:
        LoadError: names the layers by method.
    """
    found: dict[Problem, None] = {}
    for name, module in built.items():
        for part in module.modules():
            method = getattr(part, "quant_method", None)
            if method is None:
                continue
            is_lost = _is_turned
            if isinstance(method, CompressedTensorsFusedMoEMethod):
                is_lost = _is_replaced
            elif _restores(method):
                continue
            if any(map(is_lost, part.parameters(recurse=False))):
                own = type(method).__name__
                what = (
                    f"takes no new weights: {own} gave its weight another form after it was loaded"
                )
                found[Problem(name, what, "restart the server with them", "reload")] = None
    if found:
        raise LoadError(fold_problems(found))


def _is_turned(parameter: torch.Tensor) -> bool:
    """Whether a parameter is no more what its loader fills; scales of DeepGEMM's keep theirs.

    Source: `requant_weight_ue8m0_inplace` (fp8_utils.py), on compute capability 10.0 and 12.0.
    """
    return not hasattr(parameter, "weight_loader") or bool(
        getattr(parameter, "format_ue8m0", False)
    )


def _is_replaced(parameter: torch.Tensor) -> bool:
    """Whether another stands in the place of a parameter of compressed-tensors' experts.

    These restore what they repacked, but not all: the order of groups is gone, as is what Triton's
    kernels read anew, and the scales of FP8 per tensor (compressed_tensors_wNa16_moe.py:328, 517,
    compressed_tensors_w8a8_fp8_moe.py:310).
    """
    return parameter.numel() > 0 and not hasattr(parameter, "weight_loader")


def _restores(method: object) -> bool:
    """Whether a method gives its weights the checkpoint's form again when it is asked to."""
    own = getattr(type(method), "restore_weights_before_loading", None)
    return own not in (None, getattr(QuantizeMethodBase, "restore_weights_before_loading", None))
