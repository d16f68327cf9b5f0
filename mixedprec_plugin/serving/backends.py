"""The backend that SGLang chooses for the experts of a whole model, and a plan's cannot run in.

On compute capability 10.0 SGLang's arguments of Qwen3-MoE and of DeepSeek's family come out with
`moe_runner_backend` flashinfer_trtllm, by the `quantization_config` of the checkpoint
(arg_groups/overrides.py:771, arg_groups/model_overrides/qwen3_moe.py:40). AWQ and GPTQ experts run
where it is `auto` alone, INT8 ones in Triton, and several schemes of a layer where each may choose.
"""

from __future__ import annotations

import os
from typing import Any

from sglang.srt.arg_groups.model_override_base import resolving_view
from sglang.srt.arg_groups.overrides import declare_resolution

from mixedprec_plugin.experts.launch import BACKENDS
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.serving.early import make_plan, serving_device
from mixedprec_plugin.serving.settings import read_settings

_AUTO = "auto"


def keep_auto(args: Any) -> None:
    """Take back a backend that was not asked for and that the experts of the plan cannot run in.

    Args:
        args: resolved ServerArgs with the load format mixedprec, not published yet.
    Raises:
        PresetError, CheckpointError: as for `make_plan`.
    """
    if args.moe_runner_backend != _AUTO:
        return
    chosen = str(resolving_view(args).moe_runner_backend)
    if chosen == _AUTO:
        return
    if os.path.isdir(args.model_path):
        settings, device = read_settings(args), serving_device()
        plan = make_plan(args.model_path, settings, str(args.dtype), int(args.tp_size), device)
        if serves(chosen, plan):
            return
    declare_resolution(args, "mixedprec", moe_runner_backend=_AUTO)


def serves(backend: str, plan: Plan) -> bool:
    """Whether every layer of experts of a plan runs in a backend."""
    return all(
        len(groups) == 1 and backend in BACKENDS.get(groups[0].scheme.method, ())
        for groups in plan.expert_groups.values()
    )
