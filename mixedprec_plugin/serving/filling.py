"""All tensors of a plan -> a model; the proof that each found a parameter and each was filled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from torch.utils._python_dispatch import _disable_current_modes

from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.families.config import ties_head
from mixedprec_plugin.families.names import last_component
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.plan.folding import fold_problems
from mixedprec_plugin.plan.heads import unbuilt_remedy
from mixedprec_plugin.serving.config import MixedPrecisionConfig
from mixedprec_plugin.serving.kv_scales import place_kv_scale
from mixedprec_plugin.serving.placement import GROUP_INDICES, Orders, check_act_order, place
from mixedprec_plugin.serving.recorder import WriteRecorder, storage_id

Weights = Iterable[tuple[str, torch.Tensor]]


def load_weights(model: torch.nn.Module, config: MixedPrecisionConfig, weights: Weights) -> None:
    """Fill a model with the tensors of its plan.

    Raises:
        LoadError: a tensor found no parameter, or a parameter was not filled; all are named.
    """
    filling = Filling(model, config, weights)
    if problems := filling.problems or filling.unfilled():
        raise LoadError(fold_problems(problems))


class Filling:
    """Hands every tensor to what takes it.

    Linear layers and experts of the plan go straight to their parameters' weight loaders: module,
    parameter and shard are known, so no name matching of the model's can lose or rename them. The
    rest (embeddings, norms, routers) goes through `model.load_weights`.

    Attributes:
        problems: tensors that found no parameter.
        recorder: of what was written.
    """

    def __init__(
        self, model: torch.nn.Module, config: MixedPrecisionConfig, weights: Weights
    ) -> None:
        self._model, self._config = model, config
        self._family = family_of(config.plan.source.config)
        self._rest: list[str] = []
        self._orders: Orders = {}
        self.recorder = WriteRecorder()
        self.problems: list[Problem] = []
        with self.recorder:
            # the class's own: the model's is closed to others, see `close_to_unquantized`
            type(model).load_weights(model, self._place_all(weights))  # type: ignore[attr-defined]
            # an MLA model splits its kv_b_proj, which it looks for among the names that it was
            # given (`post_load_weights`, models/deepseek_common/deepseek_weight_loader.py:585)
            if any(last_component(module) == self._family.absorbed for module in config.built):
                model.post_load_weights()  # type: ignore[operator]
        self.problems += self._dropped()

    def _place_all(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        stream = iter(weights)
        while True:
            # reading and quantizing are none of the recorder's business, and faster without it
            with _disable_current_modes():
                item = next(stream, None)
            if item is None:
                return
            name, tensor = item
            try:
                is_placed = self._place(name, tensor)
            except LoadError as error:
                self.problems += error.problems
                is_placed = True
            if not is_placed:
                self.recorder.follow(name, tensor)
                self._rest.append(name)
                yield name, tensor
            # or it would be there while the next one is made
            del item, tensor

    def _place(self, name: str, tensor: torch.Tensor) -> bool:
        """Place a scale of the KV cache, or a tensor of a planned layer; whether it is one."""
        self.recorder.forget(tensor)
        if self._config.attentions and place_kv_scale(self._config, name, tensor):
            return True
        layer_name, _, suffix = name.rpartition(".")
        layer = self._config.plan.by_name.get(layer_name)
        if layer is None or layer.module not in self._config.built:
            return False
        if suffix in GROUP_INDICES and layer.shard is not None:
            check_act_order(self._orders, layer, tensor)
        place(self._config, layer, suffix, tensor)
        return True

    def _dropped(self) -> list[Problem]:
        """The tensors that went to `model.load_weights` and into no parameter."""
        plan = self._config.plan
        ties = ties_head(plan.source.config)
        what = f"is in the checkpoint, but {type(self._model).__name__} has no parameter for it"
        return [
            Problem(name, what, unbuilt_remedy(plan, name), "dropped-tensor")
            for name in self._rest
            if name not in self.recorder.arrived and not (ties and name == "lm_head.weight")
        ]

    def unfilled(self, but: Iterable[torch.nn.Module] = ()) -> list[Problem]:
        """The parameters that were not filled whole; those of some modules are left out."""
        left_out = list(but)
        if self._family.is_draft:
            # embedding and head are the model's (models/deepseek_v2.py:2888)
            modules = self._model.modules()
            left_out += [x for x in modules if isinstance(x, VocabParallelEmbedding)]
        ids = {id(parameter) for module in left_out for parameter in module.parameters()}
        remedy = "the checkpoint lacks a tensor, or SGLang's model loads it under another name"
        problems = []
        for name, parameter in self._model.named_parameters():
            written = self.recorder.written.get(storage_id(parameter.data), 0)
            if written < parameter.numel() and id(parameter) not in ids:
                share = f"{written:,} of {parameter.numel():,} elements"
                what = f"{share} were filled from the checkpoint"
                problems.append(Problem(name, what, remedy, "unfilled-parameter"))
        return problems


def close_to_unquantized(model: torch.nn.Module) -> None:
    """Refuse tensors that come past the plan, as from `update_weights_from_tensor`.

    SGLang hands them to `model.load_weights`, which would cast them into quantized parameters
    without a word.
    """

    def refuse(*_: object, **__: object) -> None:
        what = "serves a mixed-precision plan and takes no tensors past it"
        remedy = "use update_weights_from_disk, which quantizes by the preset"
        raise LoadError(Problem(type(model).__name__, what, remedy, "past-the-plan"))

    model.load_weights = refuse  # type: ignore[assignment]
