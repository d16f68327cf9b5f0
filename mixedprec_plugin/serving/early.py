"""Everything that can be found wrong before a process is started or a weight is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from mixedprec_plugin.checkpoint.converted import embedded_preset
from mixedprec_plugin.checkpoint.source import Source, open_source
from mixedprec_plugin.checkpoint.sources import open_other_sources
from mixedprec_plugin.errors import PlanError, Problem
from mixedprec_plugin.experts.launch import why_not_composite, why_not_experts
from mixedprec_plugin.families.config import model_dtype
from mixedprec_plugin.families.names import ExpertShard
from mixedprec_plugin.methods.cards import Gpu, served_dtype, version
from mixedprec_plugin.methods.interface import Device, Target
from mixedprec_plugin.plan.folding import fold_names, natural_key
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.preset import preset_for
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_preset
from mixedprec_plugin.preset.model import Preset
from mixedprec_plugin.serving.options import why_not_options
from mixedprec_plugin.serving.settings import Settings, read_settings


def check_early(args: Any) -> None:
    """Check preset, plan and launch options of a server with the load format mixedprec.

    Args:
        args: ServerArgs, or the namespace that they are made from.
    Raises:
        PresetError, CheckpointError, PlanError: with every problem.
    """
    if getattr(args, "load_format", None) != "mixedprec":
        return
    settings = read_settings(args)
    device = serving_device()
    problems = why_not_options(args, device)
    if os.path.isdir(args.model_path):
        plan = make_plan(args.model_path, settings, str(args.dtype), int(args.tp_size), device)
        problems.extend(plan.errors)
        problems.extend(_expert_problems(args, plan))
        if plan.preset.draft is not None:
            problems.extend(_draft_problems(args, plan.preset.draft, device))
    elif settings.config:
        load_preset(settings.config, settings.overrides)
    if problems:
        raise PlanError(problems)


def make_plan(
    model_path: str,
    settings: Settings,
    dtype: str,
    tp_size: int,
    device: Device,
    served: Preset | None = None,
) -> Plan:
    """Plan a preset over a local checkpoint for a running server.

    Args:
        served: what already runs, for new weights where none is named and they carry none.
    Raises:
        UsageError: no preset was named, and the checkpoint carries none.
        PresetError, CheckpointError: as the pipeline finds them; plan errors are in the plan.
    """
    source = open_source(model_path)
    flag = "--mixedprec-config (mixedprec_config in model_loader_extra_config)"
    if settings.config or served is None or embedded_preset(source.quantization_config):
        preset = preset_for(settings.config, source, settings.overrides, flag)
    else:
        preset = served
    target = _target(source, dtype, tp_size, device)
    return _resolved_once(preset, source, target, open_other_sources(preset))


def make_draft_plan(
    model_path: str, preset: Preset, dtype: str, tp_size: int, device: Device
) -> Plan:
    """Plan the section `draft` of a preset over a draft model's local checkpoint.

    Args:
        preset: `Preset.draft`.
    Raises:
        CheckpointError: as the pipeline finds them; plan errors are in the plan.
    """
    source = open_source(model_path)
    target = _target(source, dtype, tp_size, device)
    return resolve_plan(preset, source, target, open_other_sources(preset))


def _target(source: Source, dtype: str, tp_size: int, device: Device) -> Target:
    gpu = serving_gpu() if device == "cuda" else None
    running = model_dtype(source.config, dtype)
    if gpu is not None:
        running = served_dtype(running, gpu.capability)
    return Target(device, tp_size, running, gpu)


# the last plan of this process, and the state of its files when it was made
_last: tuple[Plan, object] | None = None


def _resolved_once(
    preset: Preset, model: Source, target: Target, others: Mapping[str, Source]
) -> Plan:
    """Resolve a plan, or take the last of this process where nothing changed since.

    A start asks several times: the command line, SGLang's model configs, the loader. Coupled
    layers of several sources may need weights to be read each time.
    """
    global _last
    sources = {model.name: model, **others}
    state = _state(sources)
    if _last is not None:
        plan, planned_state = _last
        is_same = (plan.preset, plan.target, dict(plan.sources)) == (preset, target, sources)
        if is_same and planned_state == state:
            return plan
    plan = resolve_plan(preset, model, target, others)
    _last = plan, state
    return plan


def _state(sources: Mapping[str, Source]) -> object:
    """When every file of the sources was last written; None for what is not downloaded yet."""
    paths = {tensor.path for source in sources.values() for tensor in source.tensors.values()}
    return {path: path.stat().st_mtime_ns if path.exists() else None for path in paths}


def serving_gpu() -> Gpu | None:
    """The GPU of this process, by its compute capability alone; None where there is none.

    SGLang's own question, which asks NVML and leaves CUDA uninitialized in a server's parent
    process (utils/common.py:756). Memory is SGLang's to watch over, as it may offload weights.
    """
    from sglang.srt.utils import get_device_sm

    capability = int(get_device_sm())
    return Gpu(f"compute capability {version(capability)}", capability) if capability else None


def serving_device() -> Device:
    """The device that SGLang's platform of this process runs on, as the plan names it.

    Raises:
        PlanError: the platform is one that no method of ours runs on.
    """
    import torch
    from sglang.srt.platforms import current_platform

    if current_platform.device_type == "cpu":
        return "cpu"
    if current_platform.device_type == "cuda" and torch.version.hip is None:
        return "cuda"
    raise PlanError(
        Problem(
            f"platform {current_platform.device_name!r}",
            "mixed precision runs on NVIDIA GPUs and on plain CPUs",
            "set SGLANG_PLATFORM=mixedprec_cpu to try the preset on the CPU",
            "platform",
        )
    )


def _draft_problems(args: Any, preset: Preset, device: Device) -> Iterable[Problem]:
    """What keeps a draft model from running as the section `draft` says."""
    if getattr(args, "speculative_algorithm", None) is None:
        return
    where, path = f"{preset.path}: draft", getattr(args, "speculative_draft_model_path", None)
    if path in (None, args.model_path):
        yield Problem(
            where,
            "the draft model is made of layers of --model-path itself, which SGLang loads as they "
            "are stored (expected a checkpoint of its own)",
            "name one with --speculative-draft-model-path, or remove the section",
            "draft",
        )
        return
    for field in ("speculative_draft_model_quantization", "speculative_draft_load_format"):
        value = getattr(args, field, None)
        if value is not None:
            flag = f"--{field.replace('_', '-')}"
            what = f"{value!r}: the preset's section draft says how the draft model is loaded"
            yield Problem(flag, what, f"start without {flag}", "draft")
    if os.path.isdir(path):
        yield from make_draft_plan(path, preset, str(args.dtype), int(args.tp_size), device).errors


def _expert_problems(args: Any, plan: Plan) -> Iterable[Problem]:
    """Launch options that the experts of the plan do not go with."""
    experts = [layer for layer in plan.layers if isinstance(layer.shard, ExpertShard)]
    methods = {layer.method for layer in experts}
    mixed = [module for module, groups in plan.expert_groups.items() if len(groups) > 1]
    schemes = {group.scheme.identity for groups in plan.expert_groups.values() for group in groups}
    found = why_not_experts(args, methods, are_alike=len(schemes) < 2)
    where = ", ".join(fold_names(sorted({layer.module for layer in experts}, key=natural_key)))
    if mixed:
        found += why_not_composite(args, methods)
        where = ", ".join(fold_names(sorted(mixed, key=natural_key)))
    for text, remedy in dict.fromkeys(found):
        yield Problem(where, text, remedy, "launch")
