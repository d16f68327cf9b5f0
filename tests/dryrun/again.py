"""New weights for a layer that is served: refused before one is written, or taken whole."""

from __future__ import annotations

from typing import Any

import torch

from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.errors import LoadError
from mixedprec_plugin.serving.config import MixedPrecisionConfig
from mixedprec_plugin.serving.filling import load_weights
from mixedprec_plugin.serving.late import check_reloadable
from tests.dryrun.cells import check_filled
from tests.dryrun.journal import JOURNAL

TAKEN, REFUSED = "taken", "refused"


def load_again(model: torch.nn.Module, config: MixedPrecisionConfig, *cast: str) -> str:
    """Do what an update of the weights does, after the layer ran.

    Args:
        cast: as for `check_filled`.
    Returns:
        `TAKEN`, and then every parameter was filled, and is what and where it was before, as the
        captured graphs of a server want it; or `REFUSED`.
    """
    try:
        check_reloadable(config.built)
    except LoadError:
        return REFUSED
    before = _describe(model)
    JOURNAL.clear()
    methods = [
        (module, module.quant_method)
        for module in model.modules()
        if getattr(module, "quant_method", None) is not None
    ]
    for module, method in methods:
        restore = getattr(method, "restore_weights_before_loading", None)
        if restore is not None:
            restore(module)
    load_weights(model, config, VirtualCheckpoint(config.plan))
    check_filled(model, *cast)
    for module, method in methods:
        method.process_weights_after_loading(module)
    after = _describe(model)
    assert after == before, (before, after)
    return TAKEN


def _describe(model: torch.nn.Module) -> dict[str, Any]:
    return {
        name: (parameter.dtype, parameter.shape, parameter.stride(), _address(parameter))
        for name, parameter in model.named_parameters()
    }


def _address(parameter: torch.Tensor) -> int:
    # what holds nothing may be anywhere
    return int(parameter.data.untyped_storage()._cdata) if parameter.numel() else 0
