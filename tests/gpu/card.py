"""Whether this machine's GPU can be tested, and which presets it runs."""

from __future__ import annotations

import importlib.util
import os
import shlex
from pathlib import Path

import torch

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.families.config import model_dtype
from mixedprec_plugin.families.names import parallel_kind
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods.cards import Gpu, served_dtype, version
from mixedprec_plugin.methods.interface import LayerShape, Target
from mixedprec_plugin.methods.remedies import find_faults
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_preset

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "presets"


def capability() -> int | None:
    """Compute capability of this machine's GPU, major * 10 + minor; None without an NVIDIA GPU."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def why_skip(found: int | None) -> str:
    """Why nothing can be tested on a GPU of this capability; empty if it can."""
    if found is None:
        return "needs an NVIDIA GPU: torch.cuda finds none"
    if found < 80:
        return f"needs compute capability 8.0 or more: this GPU has {version(found)}"
    if importlib.util.find_spec("sgl_kernel") is None:
        return "needs SGLang's kernels: there is no sgl_kernel"
    return ""


def flags() -> list[str]:
    """More flags for every server, from MIXEDPREC_GPU_FLAGS: what this machine lacks, or shares."""
    return shlex.split(os.environ.get("MIXEDPREC_GPU_FLAGS", ""))


def preset_plan(name: str, model_path: Path, found: int) -> Plan:
    """Plan a shipped preset for one GPU of a capability."""
    source = open_source(model_path)
    dtype = served_dtype(model_dtype(source.config), found)
    return resolve_plan(load_preset(PRESETS / f"{name}.yaml"), source, Target("cuda", 1, dtype))


def why_not(plan: Plan, found: int) -> list[str]:
    """Why a GPU does not run a plan; empty if it does."""
    reasons = [str(problem) for problem in plan.errors]
    for layers in plan.modules.values():
        for layer in layers:
            if layer.scheme is None or layer.stored is None:
                continue
            shape = LayerShape(
                N=layer.stored.N,
                K=layer.stored.K,
                shard_sizes=tuple(x.stored.N for x in layers if x.stored is not None),
                parallel=parallel_kind(layer.name, family_of(plan.source.config)),
                dtype=plan.target.dtype,
            )
            scheme = layer.scheme
            target = Target(dtype=plan.target.dtype, gpu=Gpu("this GPU", found))
            faults = find_faults(scheme.method, scheme.arguments, shape, target)
            reasons += [fault.text for fault in faults if fault.rule == "gpu"]
    return list(dict.fromkeys(reasons))
