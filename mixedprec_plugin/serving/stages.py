"""The part of a model that one pipeline stage builds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from sglang.srt.layers.utils.common import PPMissingLayer

from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.plan.model import PlannedLayer


class Stage:
    """Tells which planned layers this rank runs.

    SGLang puts a placeholder where another pipeline stage has a module; its path in the model is
    the beginning of its layers' names in the checkpoint. A model on one stage has none.

    Args:
        tied: tied layer name -> the layer whose weight it shares. A stage that has the one and
            not the other reads the shared weight for it.
    Raises:
        LoadError: SGLang's model is not split into stages, or the last one has no head, as where
            the model only knows to use the embedding, which is on the first (models/llama.py:569).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tied: Mapping[str, str],
        *,
        num_stages: int = 1,
        is_last: bool = True,
    ) -> None:
        self._elsewhere = tuple(
            f"{name}."
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, PPMissingLayer)
        )
        if num_stages > 1 and self.is_whole:
            what = f"SGLang's {type(model).__name__} is not split into pipeline stages"
            where, remedy = f"--pp-size {num_stages}", "start with --tp instead"
            raise LoadError(Problem(where, what, remedy, "pipeline"))
        heads = [name for name in tied if self._is_elsewhere(name)]
        if is_last and heads:
            what = (
                f"is tied to {tied[heads[0]]}, which is on the first pipeline stage, and SGLang's "
                f"{type(model).__name__} gives the last stage no head of its own"
            )
            remedy = (
                "start without --pp-size, or untie the checkpoint: store the head, and set "
                "tie_word_embeddings to false"
            )
            raise LoadError(Problem(heads[0], what, remedy, "pipeline"))
        self._shared = {tied[name] for name in tied if name not in heads}

    @property
    def is_whole(self) -> bool:
        """Whether this rank builds the whole model."""
        return not self._elsewhere

    def runs(self, layer: PlannedLayer) -> bool:
        """Whether the layer is this rank's."""
        return layer.name in self._shared or not self._is_elsewhere(layer.name)

    def describe(self, layers: Iterable[PlannedLayer]) -> str:
        """Say how much of a plan this rank reads."""
        layers = list(layers)
        own = [layer for layer in layers if self.runs(layer)]
        read, whole = (sum(layer.bytes_before for layer in part) for part in (own, layers))
        return (
            f"this pipeline stage reads {len(own)} of {len(layers)} layers, "
            f"{read / 1e6:,.1f} of {whole / 1e6:,.1f} MB"
        )

    def _is_elsewhere(self, name: str) -> bool:
        return bool(self._elsewhere) and f"{name}.".startswith(self._elsewhere)
