"""Everything that can be found wrong before a process is started or a weight is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mixedprec_plugin.checkpoint.converted import is_converted
from mixedprec_plugin.errors import PlanError, Problem, UsageError
from mixedprec_plugin.experts.launch import DEEPEP, deepep_fault, why_not_composite, why_not_experts
from mixedprec_plugin.families.names import ExpertShard, last_component
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods.interface import Device
from mixedprec_plugin.plan.drafts import own_draft
from mixedprec_plugin.plan.folding import fold_names, natural_key
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.preset.load import load_preset
from mixedprec_plugin.preset.model import Preset
from mixedprec_plugin.serving.options import why_not_options
from mixedprec_plugin.serving.planner import make_draft_plan, plan_of, serving_device
from mixedprec_plugin.serving.settings import read_settings

_AUTO = "auto"


def check_early(args: Any) -> None:
    """Check preset, plan and launch options of a server with the load format mixedprec.

    Args:
        args: ServerArgs, or the namespace that they are made from.
    Raises:
        PresetError, CheckpointError, PlanError: with every problem.
    """
    if getattr(args, "load_format", None) != "mixedprec":
        return
    device = serving_device()
    problems = why_not_options(args, device)
    problems.extend(_kv_problems(args, preset_of(args)))
    if os.path.isdir(args.model_path):
        plan = plan_of(args)
        problems.extend(plan.errors)
        problems.extend(_expert_problems(args, plan))
        problems.extend(_head_problems(args, plan))
        if plan.preset.draft is not None:
            problems.extend(_draft_problems(args, plan, plan.preset.draft, device))
    if problems:
        raise PlanError(problems)


def check_not_converted(args: Any) -> None:
    """Refuse a folder that `mixedprec convert` wrote without its load format.

    SGLang has no method of that name, and would say so after a minute.

    Raises:
        UsageError: the model's folder is one.
    """
    path = Path(str(args.model_path)) / "config.json"
    if getattr(args, "load_format", None) == "mixedprec" or not path.is_file():
        return
    try:
        said = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return  # SGLang's to tell
    if isinstance(said, Mapping) and is_converted(said):
        what = "was written by mixedprec convert, in a format that SGLang alone does not read"
        raise UsageError(Problem(str(args.model_path), what, "add --load-format mixedprec"))


def preset_of(args: Any) -> Preset | None:
    """The preset that a server is started with, as far as it is here; None where it is not.

    Raises:
        UsageError, PresetError, CheckpointError: as for `plan_of`.
    """
    settings = read_settings(args)
    if os.path.isdir(args.model_path):
        return plan_of(args).preset
    return load_preset(settings.config, settings.overrides) if settings.config else None


def set_kv_dtype(args: Any) -> None:
    """Have the KV cache in the dtype that the preset says, where no option does.

    Args:
        args: ServerArgs, not resolved yet.
    """
    preset = preset_of(args)
    if preset is not None and preset.kv_cache.dtype != _AUTO and args.kv_cache_dtype == _AUTO:
        args.kv_cache_dtype = preset.kv_cache.dtype


def _kv_problems(args: Any, preset: Preset | None) -> Iterable[Problem]:
    given = getattr(args, "kv_cache_dtype", None) or _AUTO
    wanted = _AUTO if preset is None else preset.kv_cache.dtype
    if preset is not None and _AUTO not in (given, wanted) and given != wanted:
        what = f"is {wanted!r}, and --kv-cache-dtype is {given!r}"
        where = f"{preset.path}: kv_cache.dtype"
        yield Problem(where, what, "leave one of them out", "launch")


def _draft_problems(args: Any, plan: Plan, preset: Preset, device: Device) -> Iterable[Problem]:
    if getattr(args, "speculative_algorithm", None) in _WITHOUT_HEADS:
        return
    path = getattr(args, "speculative_draft_model_path", None) or args.model_path
    if path == args.model_path and own_draft(plan.source) is None:
        known = family_of(plan.source.config).drafts_with
        what = "--model-path holds no layers of multi-token prediction"
        if not known:
            what = "SGLang makes no draft model that is known of --model-path's own layers"
        remedy = "name one with --speculative-draft-model-path, or remove the section"
        yield Problem(f"{preset.path}: draft", what, remedy, "draft")
        return
    for field in ("speculative_draft_model_quantization", "speculative_draft_load_format"):
        value = getattr(args, field, None)
        if value is not None:
            flag = f"--{field.replace('_', '-')}"
            what = f"{value!r}: the preset's section draft says how the draft model is loaded"
            yield Problem(flag, what, f"start without {flag}", "draft")
    if os.path.isdir(path):
        draft = make_draft_plan(path, preset, str(args.dtype), int(args.tp_size), device)
        yield from draft.errors
        fault = _why_not_deepep(draft) if _experts(draft) else ""
        if fault and getattr(args, "moe_a2a_backend", None) == DEEPEP:
            where, what = f"{preset.path}: draft", f"--moe-a2a-backend {DEEPEP!r}: {fault}"
            yield Problem(where, what, "start without it", "launch")


# what shares no weight with the model's head
_WITHOUT_HEADS = (None, "NGRAM")


def _head_problems(args: Any, plan: Plan) -> Iterable[Problem]:
    """Launch options that a quantized `lm_head` does not go with.

    Source: `_compute_lm_head` (layers/logits_processor.py:1205), which hands the head's kernel
    floats of 32 bits; `get_embed_and_head` (models/llama.py:892), the `weight` that draft models
    take over.
    """
    names = family_of(plan.source.config).lm_heads
    heads = [x for x in plan.layers if last_component(x.name) in names and not x.is_unquantized]
    for head in heads:
        if getattr(args, "enable_fp32_lm_head", False):
            what = f"{head.scheme.label if head.scheme else ''} does not run in float32"
            yield Problem(head.name, what, "start without --enable-fp32-lm-head", "launch")
        algorithm = getattr(args, "speculative_algorithm", None)
        if algorithm not in _WITHOUT_HEADS:
            what = f"--speculative-algorithm {algorithm!r}: the draft model takes over its floats"
            remedy = "leave lm_head as it is stored, or start without a draft model"
            yield Problem(head.name, what, remedy, "launch")


def _experts(plan: Plan) -> list[PlannedLayer]:
    """The projections of experts that the plan's model runs."""
    return [x for x in plan.layers if isinstance(x.shard, ExpertShard) and x.kind != "draft"]


def _why_not_deepep(plan: Plan) -> str:
    schemes = [(x.method, x.scheme.arguments if x.scheme else {}) for x in _experts(plan)]
    return deepep_fault(schemes, plan.target.gpu.capability if plan.target.gpu else 0)


def _expert_problems(args: Any, plan: Plan) -> Iterable[Problem]:
    experts = _experts(plan)
    methods = {layer.method for layer in experts}
    mixed = [module for module, groups in plan.expert_groups.items() if len(groups) > 1]
    schemes = {group.scheme.identity for groups in plan.expert_groups.values() for group in groups}
    found = why_not_experts(
        args, methods, are_alike=len(schemes) < 2, why_not_deepep=_why_not_deepep(plan)
    )
    where = ", ".join(fold_names(sorted({layer.module for layer in experts}, key=natural_key)))
    if mixed:
        found += why_not_composite(args, methods)
        where = ", ".join(fold_names(sorted(mixed, key=natural_key)))
    for text, remedy in dict.fromkeys(found):
        yield Problem(where, text, remedy, "launch")
