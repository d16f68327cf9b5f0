"""The comparison while a model is loaded."""

from __future__ import annotations

import logging

import torch

from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.compose.stream import Weights
from mixedprec_plugin.errors import LoadError, printable
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.verify.report import problems, worst_first
from mixedprec_plugin.verify.verifier import Comparison, Verifier, check_recorded

logger = logging.getLogger(__name__)


def verified(weights: Weights, plan: Plan, reference: Source) -> Weights:
    """Yield the tensors of a virtual checkpoint, and compare each layer once it is whole.

    Raises (while iterating, after the last tensor):
        LoadError: with every layer that is too far from its reference, the worst first.
        CheckpointError: a converted checkpoint is not what was written, or the reference changed.
    """
    held: dict[str, dict[str, torch.Tensor]] = {}
    found: list[Comparison] = []
    with plan.preset.concealing(), Reader() as reader:
        check_recorded(plan, reference)
        verifier = Verifier(plan, reference, {}, reader)
        for name, tensor in weights:
            layer_name, _, suffix = name.rpartition(".")
            layer = plan.by_name[layer_name]
            held.setdefault(layer_name, {})[suffix] = tensor
            if len(held[layer_name]) == len(layer.outputs):
                found.extend(verifier.compare(layer, held.pop(layer_name)))
            yield name, tensor
    reference.check_unchanged()
    if errors := problems(found):
        raise LoadError(errors)
    if found:
        worst = worst_first(found)[0]
        assert worst.distance is not None
        logger.info(
            "mixedprec: %d layers compared with %s; the worst is %s with a relative error of %.3g",
            len(found), reference.name, printable(worst.layer), worst.distance.relative_error,
        )  # fmt: skip
