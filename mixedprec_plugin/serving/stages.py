"""The part of a model that one pipeline stage builds."""

from __future__ import annotations

import torch
from sglang.srt.layers.utils.common import PPMissingLayer

from mixedprec_plugin.plan.model import PlannedLayer


class Stage:
    """Tells which planned layers this rank runs.

    SGLang puts a placeholder where another pipeline stage has a module; its path in the model is
    the beginning of its layers' names in the checkpoint. A model on one stage has none.

    Args:
        model: as SGLang built it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._elsewhere = tuple(
            f"{name}."
            for name, module in model.named_modules()
            if isinstance(module, PPMissingLayer)
        )

    @property
    def is_whole(self) -> bool:
        """Whether this rank builds the whole model."""
        return not self._elsewhere

    def runs(self, layer: PlannedLayer) -> bool:
        """Whether the layer is this rank's."""
        return not f"{layer.name}.".startswith(self._elsewhere) if self._elsewhere else True
