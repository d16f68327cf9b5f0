"""The proof that every tensor found a parameter, and every parameter was filled."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch

from mixedprec_plugin.errors import Problem
from mixedprec_plugin.serving.config import MixedPrecisionConfig
from mixedprec_plugin.serving.recorder import WriteRecorder, storage_id


@dataclasses.dataclass(frozen=True)
class Filling:
    """What became of the tensors of a plan.

    Attributes:
        problems: tensors that found no parameter.
        taken_over: ids of the parameters of a draft model that are its model's.
    """

    problems: tuple[Problem, ...]
    recorder: WriteRecorder
    taken_over: frozenset[int]


def dropped(
    model: torch.nn.Module,
    config: MixedPrecisionConfig,
    rest: list[str],
    recorder: WriteRecorder,
) -> list[Problem]:
    """The tensors that went to `model.load_weights` and into no parameter."""
    ties = bool(config.plan.source.config.get("tie_word_embeddings"))
    what = f"is in the checkpoint, but {type(model).__name__} has no parameter for it"
    remedy = "the model in SGLang and the checkpoint are not of one architecture"
    return [
        Problem(name, what, remedy, "dropped-tensor")
        for name in rest
        if name not in recorder.arrived and not (ties and name == "lm_head.weight")
    ]


def unfilled(
    model: torch.nn.Module, filling: Filling, but: Collection[torch.nn.Module] = ()
) -> list[Problem]:
    """The parameters that were not filled whole; those of some modules are left out."""
    left_out = {id(parameter) for module in but for parameter in module.parameters()}
    left_out |= filling.taken_over
    remedy = "the checkpoint lacks a tensor, or SGLang's model loads it under another name"
    problems = []
    for name, parameter in model.named_parameters():
        written = filling.recorder.written.get(storage_id(parameter.data), 0)
        if written < parameter.numel() and id(parameter) not in left_out:
            what = f"{written:,} of {parameter.numel():,} elements were filled from the checkpoint"
            problems.append(Problem(name, what, remedy, "unfilled-parameter"))
    return problems
