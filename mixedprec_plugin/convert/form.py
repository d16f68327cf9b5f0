"""What is written of each layer, and what config.json says of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from mixedprec_plugin import __version__
from mixedprec_plugin.checkpoint.converted import LAYERS_KEY, PRESET_KEY, QUANT_METHOD, fold_layers
from mixedprec_plugin.checkpoint.recorded import PROVENANCE_NAME
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.methods.stored import TensorSpec
from mixedprec_plugin.plan.conversion import is_auto
from mixedprec_plugin.plan.model import Plan, PlannedLayer

Tensors = Mapping[str, torch.Tensor]


class Form(Protocol):
    """A way to write a plan down."""

    name: str

    def problems(self, plan: Plan) -> list[Problem]:
        """What of a plan cannot be written down so."""

    def outputs(self, layer: PlannedLayer) -> Mapping[str, TensorSpec]:
        """Parameter suffix -> what is written."""

    def tensors(self, layer: PlannedLayer, composed: Tensors) -> Tensors:
        """Parameter suffix -> tensor, as `outputs` says, made of what the layer is served as."""

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        """What config.json says of the whole."""


class MixedForm:
    """Every layer as it is served; `--load-format mixedprec` loads it without a preset."""

    name = "mixedprec"

    def problems(self, plan: Plan) -> list[Problem]:
        """Rules whose patterns read the environment: config.json would hold the values."""
        preset = plan.preset
        rules = [*preset.rules, *(preset.draft.rules if preset.draft else ())]
        what = "reads an environment variable, whose value config.json would hold"
        remedy = "write the pattern out, or set it with --mixedprec-set"
        return [
            Problem(str(rule.location), f"{', '.join(rule.shown)} {what}", remedy, "environment")
            for rule in rules
            if rule.shown != rule.patterns
        ]

    def outputs(self, layer: PlannedLayer) -> Mapping[str, TensorSpec]:
        return layer.outputs

    def tensors(self, layer: PlannedLayer, composed: Tensors) -> Tensors:
        return composed

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        """The preset, and how each quantized layer is stored."""
        stored: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
        for layer in plan.layers:
            if not layer.is_unquantized:
                config = _config_of(layer, plan)
                stored.setdefault(repr(config), (config, []))[1].append(layer.name)
        return {
            "quant_method": QUANT_METHOD,
            "version": __version__,
            PRESET_KEY: without_sources(plan.preset.resolved),
            LAYERS_KEY: [
                {"config": config, "names": fold_layers(names)} for config, names in stored.values()
            ],
            "provenance": PROVENANCE_NAME,
        }


def _config_of(layer: PlannedLayer, plan: Plan) -> Mapping[str, Any]:
    """What a checkpoint that is wholly stored as a layer is says: under `auto`, its source's."""
    assert layer.scheme is not None
    if is_auto(layer.rule):
        said = plan.sources[layer.source].quantization_config_of(layer.name)
        if said:
            return said
    return METHODS[layer.scheme.method].declare(layer.scheme.arguments)


def without_sources(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's plain data for a checkpoint that holds all layers itself."""
    data = copy.deepcopy(dict(resolved))
    for key in ("sources", "trust_sources", "untie_lm_head"):
        data.pop(key, None)
    rules = [*data["rules"], *data.get("draft", {}).get("rules", ())]
    for entry in (*data.get("schemes", {}).values(), *rules):
        if isinstance(entry, dict):
            entry.pop("source", None)
    # the checkpoint holds the scales itself
    if data.get("kv_cache", {}).get("scales") not in (None, "none"):
        data["kv_cache"].pop("scales")
    return data
