"""What an engine's modules were given: inputs of linear layers and experts, experts of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mixedprec_plugin.plan.model import Plan


@dataclasses.dataclass
class Trace:
    """What went into the modules of a plan, forward after forward.

    Attributes:
        inputs: module, as the plan names it -> its input of each forward, [T, K].
        choices: module of experts -> ids of each forward, [T, top_k].
    """

    inputs: dict[str, list[torch.Tensor]] = dataclasses.field(default_factory=dict)
    choices: dict[str, list[torch.Tensor]] = dataclasses.field(default_factory=dict)


def watch(built: Mapping[str, torch.nn.Module]) -> Trace:
    """Keep what modules are given from now on.

    Args:
        built: module, as the plan names it -> the module that SGLang built.
    """
    trace = Trace()
    for name, module in built.items():
        module.register_forward_pre_hook(_keeper(trace, name), with_kwargs=True)
    return trace


def _keeper(trace: Trace, name: str) -> Any:
    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        trace.inputs.setdefault(name, []).append(given[0].clone())
        ids = [value.topk_ids for value in given if hasattr(value, "topk_ids")]
        if ids:
            trace.choices.setdefault(name, []).append(ids[0].clone())

    return keep


def join(traces: Sequence[Trace], plan: Plan) -> Trace:
    """Put the traces of all ranks together.

    A layer that ranks split by its input gets a part of it on each; others get the same on all.
    """
    first = traces[0]
    joined = Trace(choices=first.choices)
    for module, inputs in first.inputs.items():
        stored = plan.modules[module][0].stored
        assert stored is not None
        joined.inputs[module] = inputs
        if inputs[0].shape[-1] != stored.K:
            parts = zip(*(trace.inputs[module] for trace in traces), strict=True)
            joined.inputs[module] = [torch.cat(part, dim=-1) for part in parts]
    return joined
