"""Layers of multi-token prediction in a model's own checkpoint, as the draft model they make."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from mixedprec_plugin.checkpoint.converted import FOLDED_KEY, LAYERS_KEY, is_converted
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.families.names import draft_layers, last_component
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.plan.sources import open_other_sources
from mixedprec_plugin.preset.model import KvCache, Preset

# a draft model takes them over from its model; some checkpoints hold them a second time
# (models/deepseek_common/deepseek_weight_loader.py:325)
_TAKEN_OVER = frozenset({"embed_tokens", "head"})


def own_draft(source: Source) -> Source | None:
    """A checkpoint's layers of multi-token prediction, as SGLang makes a draft model of them.

    Returns:
        the same files with these layers alone, and the draft model's architecture; None where the
        checkpoint has none, or SGLang makes none of them that is known.
    Source: `_config_draft_model` (configs/model_config.py:1010).
    """
    family = family_of(source.config)
    holders = {name: name.rpartition(".")[0] for name in source.tensors}
    drafts = draft_layers(source.config, set(holders.values()), family)
    drafts = frozenset(name for name in drafts if last_component(name) not in _TAKEN_OVER)
    if not drafts or not family.drafts_with:
        return None
    tensors = {name: tensor for name, tensor in source.tensors.items() if holders[name] in drafts}
    config = {**source.config, "architectures": [family.drafts_with]}
    if is_converted(source.quantization_config):
        said = {name: source.quantization_config_of(name) for name in sorted(drafts)}
        layers = [{"config": own, "names": [name]} for name, own in said.items() if own]
        own_layers = {LAYERS_KEY: layers, FOLDED_KEY: []}
        config["quantization_config"] = {**source.quantization_config, **own_layers}
    return dataclasses.replace(
        source, config=MappingProxyType(config), tensors=MappingProxyType(tensors)
    )


def resolve_draft_plan(preset: Preset, source: Source, target: Target) -> Plan:
    """Plan a preset's section `draft`.

    Args:
        preset: `Preset.draft`.
        source: a draft model's checkpoint, or a model's whose own layers are one; of the other
            sources of the preset the same is taken.
    Raises:
        CheckpointError: another source cannot be read.
    """
    others = open_other_sources(preset)
    drafts = {name: own_draft(other) or other for name, other in others.items()}
    return resolve_plan(preset, own_draft(source) or source, target, drafts)


def as_stored(preset: Preset) -> Preset:
    """A section `draft` by which every layer stays as it is stored."""
    return dataclasses.replace(preset, rules=(), draft=None, kv_cache=KvCache(), warnings=())


def with_draft(plan: Plan, draft: Plan) -> Plan:
    """A plan whose layers for a draft model become what that model's own plan says."""
    return dataclasses.replace(
        plan,
        layers=tuple(draft.by_name.get(layer.name, layer) for layer in plan.layers),
        problems=(*plan.problems, *draft.problems),
        sources=MappingProxyType({**draft.sources, **plan.sources}),
    )
