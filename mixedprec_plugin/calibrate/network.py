"""transformers' class of a model, filled from a plan's sources, a decoder layer at a time.

Its weights are floats: those that a plan is made of before anything is rounded, or those that it
serves, dequantized. What is not loaded takes no memory.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.compose.stream import Compose, Tensors, compose_floats
from mixedprec_plugin.errors import CheckpointError, Problem
from mixedprec_plugin.plan.model import Plan, PlannedLayer


class Network:
    """A causal language model in float32 whose parameters come and go.

    Args:
        plan: a plan without errors; its model's config.json names the class.
        device: where it computes; the first GPU, or else the CPU, if None.
        compose: gives the floats of a layer of the plan.
    Raises:
        CheckpointError: transformers has no such class, or one without a plain list of layers.
    """

    def __init__(
        self, plan: Plan, reader: Reader, device: torch.device | None = None,
        compose: Compose = compose_floats,
    ) -> None:  # fmt: skip
        self._plan, self._reader, self._compose = plan, reader, compose
        self.source, self.device = plan.source, device or usual_device()
        self.model = self._empty_model()
        mapping: list[Any] = [*get_model_conversion_mapping(self.model)]
        self._loading = LoadStateDictConfig(
            dtype=torch.float32, device_map={"": self.device}, weight_mapping=mapping
        )
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        known = self.model.state_dict()
        #: parameter of transformers' model -> the layers of the plan that it is made of
        self.parts: dict[str, list[PlannedLayer]] = {}
        for layer in plan.layers:
            for suffix in _float_suffixes(layer):
                key, prefix = layer.tensor_name(suffix), self.model.base_model_prefix
                name, _ = rename_source_key(key, renamings, converters, prefix, known)
                if layer.kind != "draft" and name in known:
                    self.parts.setdefault(name, []).append(layer)
        decoder = self.model.get_decoder()
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, torch.nn.ModuleList):
            raise self.unsupported(f"{type(decoder).__name__} has no list of layers")
        self.layers = layers
        self.path = next(name for name, module in self.model.named_modules() if module is layers)

    def _empty_model(self) -> Any:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            config = AutoConfig.from_pretrained(self.source.path)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    config, dtype=torch.float32, attn_implementation="sdpa",
                    experts_implementation="eager",
                )  # fmt: skip
        except (ValueError, KeyError, OSError) as error:
            raise self.unsupported(str(error)) from error
        # what no checkpoint holds (frequencies of rotary embeddings) the classes compute themselves
        for module in model.modules():
            buffers = {n for n in module._buffers if n in module._non_persistent_buffers_set}
            for name in buffers:
                if (buffer := module._buffers[name]) is not None:
                    module._buffers[name] = torch.empty_like(buffer, device=self.device)
            if buffers:
                with torch.no_grad():
                    model._init_weights(module)
        return model.eval()

    def unsupported(self, why: str) -> CheckpointError:
        """The error of a model that cannot be run layer by layer."""
        where = str(self.source.path / "config.json")
        what = f"transformers cannot run this model: {why}"
        remedy = "it can be neither calibrated nor evaluated here"
        return CheckpointError(Problem(where, what, remedy, "transformers"))

    def planned(self, index: int | None) -> list[PlannedLayer]:
        """The layers of the plan that a decoder layer is made of; of no decoder layer for None."""
        found = {
            id(layer): layer
            for name, layers in self.parts.items()
            if self._is_in(name, index)
            for layer in layers
        }
        return list(found.values())

    def _is_in(self, parameter: str, index: int | None) -> bool:
        if index is None:
            return not parameter.startswith(f"{self.path}.")
        return parameter.startswith(f"{self.path}.{index}.")

    @contextlib.contextmanager
    def loaded(self, index: int | None) -> Iterator[list[PlannedLayer]]:
        """Hold the weights of one decoder layer, or of all that is in none (None); give its layers.

        Raises:
            CheckpointError: a source is damaged, or parameters are left without a tensor.
        """
        layers = self.planned(index)
        held: Tensors = {}
        for layer in layers:
            made = self._compose(layer, self._plan.target, self._reader)
            held |= {layer.tensor_name(suffix): tensor for suffix, tensor in made.items()}
        convert_and_load_state_dict_in_model(self.model, held, self._loading)
        held.clear()
        self.model.tie_weights()
        self.model.requires_grad_(False)
        own = {n: p for n, p in self.model.named_parameters() if self._is_in(n, index)}
        if missing := [name for name, parameter in own.items() if parameter.is_meta]:
            raise self.unsupported(f"no tensor of the checkpoint is its {missing[0]}")
        try:
            yield layers
        finally:
            for name in own:
                _drop(self.model, name)

    def logits(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Predictions [B, T, V] of tokens [B, T] and states behind the last layer, [B, T, size]."""

        def give(index: int, before: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return hidden if index == len(self.layers) - 1 else before

        with self.without_layers(give):
            made: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return made

    @contextlib.contextmanager
    def without_layers(self, replacement: Callable[..., Any]) -> Iterator[None]:
        """Have `replacement(index, hidden_states, **kwargs)` called for each decoder layer."""
        for index, layer in enumerate(self.layers):
            layer.forward = functools.partial(replacement, index)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward


def _float_suffixes(layer: PlannedLayer) -> list[str]:
    """The parameters of a layer once it is dequantized."""
    if layer.stored is None or layer.stored.is_plain:
        return list(layer.inputs)
    beside = [suffix for suffix in layer.inputs if suffix not in layer.stored.suffixes]
    return ["weight", *beside]


def usual_device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _drop(model: Any, name: str) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    empty = torch.empty_like(module._parameters[last], device="meta")
    module._parameters[last] = torch.nn.Parameter(empty, requires_grad=False)
