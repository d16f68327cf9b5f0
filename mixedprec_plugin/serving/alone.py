"""A plan held against SGLang's model in a process that serves nothing: no ranks, no device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import get_context, get_parallel

from mixedprec_plugin.errors import Problem
from mixedprec_plugin.methods.stored import FLOAT_DTYPES
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.serving.hooks import asked_for, require_registration
from mixedprec_plugin.serving.outline import Outline, outline_of
from mixedprec_plugin.serving.planner import serving_device
from mixedprec_plugin.serving.source_configs import REFUSALS, words_of


def outline_alone(plan: Plan, *, is_draft: bool = False) -> Outline:
    """Hold a plan against the model of the first of its ranks.

    Args:
        plan: without errors, over a checkpoint folder.
    Raises:
        LoadError: the model and the plan do not go together.
        RegistrationError: the plugin does not fit the installed SGLang.
    """
    load_plugins()
    require_registration()
    folder, dtype = str(plan.source.path), FLOAT_DTYPES[plan.target.dtype]
    with one_rank(folder, plan.target.tp_size), asked_for():
        try:
            model_config = ModelConfig(folder, dtype=dtype, is_draft_model=is_draft)
        except REFUSALS as error:
            what = f"SGLang does not read it ({type(error).__name__}: {words_of(error)})"
            remedy = "say there what SGLang asks for, or take a release that knows the model"
            return Outline(problems=(Problem("config.json", what, remedy, "model-refused"),))
        model_config.quantization = None
        has_methods = plan.target.device == serving_device()
        return outline_of(plan, model_config, LoadConfig(), has_methods=has_methods)


@contextlib.contextmanager
def one_rank(
    model_path: str, tp_size: int = 1, rank: int = 0, *, ep_size: int = 1
) -> Iterator[None]:
    """Publish SGLang's context of one of some tensor-parallel ranks, without the others.

    Args:
        ep_size: over how many of them experts are spread whole; each is split over the rest.
    """
    alone, all_ranks = _group(0, 1), _group(rank, tp_size)
    moe_ep_rank, moe_tp_rank = divmod(rank, tp_size // ep_size)
    said = get_context().override_server_args(
        model_path=model_path, tp_size=tp_size, ep_size=ep_size, device="cpu"
    )
    ranks = get_parallel().override(
        tp_size=tp_size, attn_tp_size=tp_size, moe_tp_size=tp_size // ep_size, moe_ep_size=ep_size,
        tp_rank=rank, attn_tp_rank=rank, moe_tp_rank=moe_tp_rank, moe_ep_rank=moe_ep_rank,
        pp_rank=0, attn_dp_rank=0, attn_cp_rank=0, moe_dp_rank=0, attn_dcp_rank=0,
        tp_group=all_ranks, attn_tp_group=all_ranks,
        moe_tp_group=_group(moe_tp_rank, tp_size // ep_size),
        moe_ep_group=_group(moe_ep_rank, ep_size), pp_group=alone,
    )  # fmt: skip
    with said, ranks:
        yield


def _group(rank: int, size: int) -> SimpleNamespace:
    return SimpleNamespace(
        rank=rank,
        rank_in_group=rank,
        world_size=size,
        cpu_group=None,
        device_group=None,
        is_first_rank=rank == 0,
        is_last_rank=rank == size - 1,
    )
