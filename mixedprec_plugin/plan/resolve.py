"""Preset x source -> plan: every decision is made here, from headers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mixedprec_plugin.checkpoint.garbage import gc_paused
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.names import (
    NEVER_QUANTIZED,
    Kind,
    draft_layers,
    fused_module,
    last_component,
    layer_kind,
    scheme_unit,
    shard_order,
)
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.recognition import FormatCache
from mixedprec_plugin.names import nearest, without_numbers
from mixedprec_plugin.plan import checks, heads
from mixedprec_plugin.plan.auto import find_mixed_experts, find_mixed_modules
from mixedprec_plugin.plan.conversion import Asked, Conversions
from mixedprec_plugin.plan.family_checks import check_config_shapes
from mixedprec_plugin.plan.folding import fold_names, natural_key
from mixedprec_plugin.plan.kv_cache import KvScales
from mixedprec_plugin.plan.matching import match_rules
from mixedprec_plugin.plan.mixing import settle_sources
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.plan.schemes import SchemeChooser, check_expert_ids, settle_fused_modules
from mixedprec_plugin.plan.whole import check_whole
from mixedprec_plugin.preset.model import Preset, Rule


@gc_paused()
def resolve_plan(
    preset: Preset,
    model: Source,
    target: Target,
    others: Mapping[str, Source] = MappingProxyType({}),
) -> Plan:
    """Decide for every layer of a model what it runs as and which checkpoint it comes from.

    Args:
        preset: the rules.
        model: the checkpoint of --model-path; its layers are the model's.
        target: device, tensor-parallel size and dtype to plan for.
        others: name -> checkpoint, of the preset's `sources`.
    Returns:
        the plan; what is wrong is in its `problems`, nothing is raised for it.
    """
    sources, family = {model.name: model, **others}, family_of(model.config)
    names = sorted(model.layers.keys(), key=natural_key)
    names = [name for name in names if last_component(name) not in family.computed]
    formats = FormatCache()
    kinds = _kinds(model, names, formats)
    shared = heads.tied_layers(model, kinds)
    apart: Mapping[str, str] = {}
    if preset.untie_lm_head and shared:
        apart, shared = shared, {}
        sources = {name: heads.untied(source, apart) for name, source in sources.items()}
        model = sources[model.name]
        names += [name for name in apart if name not in kinds]
        kinds |= dict.fromkeys(apart, "lm_head")
    # SGLang passes over a copy of the embedding, which stays what it is
    tied = {name: embedding for name, embedding in shared.items() if name not in kinds}
    drafts = {name for name, kind in kinds.items() if kind == "draft"}
    matches = match_rules(preset.rules, (*names, *tied), uncounted=drafts)
    own = [name for name, kind in kinds.items() if kind == "lm_head"]
    matches = heads.decided_by_name(matches, preset.rules, (*own, *tied))
    rules = matches.deciding
    taken, problems = _take(names, rules, kinds, sources)
    scales = KvScales(preset.kv_cache, sources, names, drafts)
    names = [name for name in names if scales.of(name, taken[name].layers[name])]
    names += scales.alone
    taken |= dict.fromkeys(scales.alone, model)
    kinds |= dict.fromkeys(scales.alone, "other")
    problems += scales.problems(preset)
    bare = set(scales.alone)
    stored = {n: None if n in bare else formats.of(taken[n], n) for n in names}
    for name in own:
        if name not in shared and heads.is_served_quantized(rules.get(name), stored[name]):
            kinds[name] = "linear"
    chooser = SchemeChooser(target)
    asked = {name: chooser.of(rules.get(name), stored[name], kinds[name]) for name in names}
    fused = {name: fused_module(name, model.layers.keys(), family) for name in names}
    units: dict[str, list[str]] = {}
    for name, (module, shard) in sorted(fused.items(), key=lambda item: shard_order(item[1][1])):
        units.setdefault(scheme_unit(module, shard), []).append(name)
    held = {name: (taken[name].name, stored[name]) for name in names}
    mixed, mixtures = find_mixed_modules(units, rules, held)
    settled = {unit: shards for unit, shards in units.items() if unit not in mixed}
    schemes, conflicts = settle_fused_modules(preset, settled, asked, rules)
    problems += mixtures + conflicts
    whole: dict[str, Kind] = {**kinds, **dict.fromkeys(tied, "lm_head")}
    problems += checks.check_rules(preset, matches, whole, fused, shared)
    problems += check_expert_ids(preset.rules, [shard for _, shard in fused.values()])
    notes = dict.fromkeys(drafts, "left to a draft model")
    notes |= {name: f"untied from {embedding}" for name, embedding in apart.items()}
    conversions, planned = Conversions(target, model.config), []
    for name in names:
        module, shard = fused[name]
        tensors = scales.of(name, {} if name in bare else taken[name].layers[name])
        to_do = Asked(schemes[name], rules.get(name), stored[name], tensors, kinds[name])
        conversion = scales.conversion(name) or conversions.of(to_do)
        if name in apart:  # its bytes are the embedding's
            conversion = dataclasses.replace(conversion, bytes_before=0)
        matrices = to_do.stored.matrices if to_do.stored else {}
        planned.append(
            PlannedLayer(
                name=name,
                module=module,
                shard=shard,
                kind=kinds[name],
                scheme=schemes[name],
                rule=rules.get(name),
                source=taken[name].name,
                stored=stored[name],
                inputs={**tensors, **matrices},
                note=notes.get(name, ""),
                **vars(conversion),
            )
        )
    problems += find_mixed_experts(
        [layer for layer in planned if scheme_unit(layer.module, layer.shard) not in mixed]
    )
    planned, mismatches = settle_sources(preset, planned, sources, target, matches, tied, formats)
    problems += mismatches
    problems += checks.check_layers(planned, target, model.config)
    problems += check_config_shapes(planned, model)
    problems += check_whole(planned, tied, model.config)
    return Plan(
        preset,
        MappingProxyType(sources),
        target,
        tuple(planned),
        tuple(map(preset.conceal, (*preset.warnings, *problems))),
        MappingProxyType(dict(tied)),
        matches,
    )


def _kinds(model: Source, names: Sequence[str], formats: FormatCache) -> dict[str, Kind]:
    family = family_of(model.config)
    known: dict[object, Kind] = {}
    kinds: dict[str, Kind] = {}
    for name in names:
        stored = formats.of(model, name)
        # names that share a format differ in numbers only
        key = without_numbers(name) if stored is None else id(stored)
        if key not in known:
            known[key] = layer_kind(name, stored is not None, family)
        kinds[name] = known[key]
    return kinds | dict.fromkeys(draft_layers(model.config, names, family), "draft")


def _take(
    names: Sequence[str],
    rules: Mapping[str, Rule],
    kinds: Mapping[str, Kind],
    sources: Mapping[str, Source],
) -> tuple[dict[str, Source], list[Problem]]:
    """Find every layer in the source that its rule names.

    Layers that no method quantizes follow a rule to its source where that holds them, too; a rule
    that takes nothing else has to find some.
    """
    taken: dict[str, Source] = {}
    missing: dict[tuple[str, str], list[str]] = {}
    found = {
        rule.index for name, rule in rules.items() if name in sources[rule.scheme.source].layers
    }
    for name in names:
        rule = rules.get(name)
        source = sources["model"] if rule is None else sources[rule.scheme.source]
        if name not in source.layers:
            if rule and (kinds[name] not in NEVER_QUANTIZED or rule.index not in found):
                missing.setdefault((source.name, str(rule.location)), []).append(name)
            source = sources["model"]
        taken[name] = source
    problems = []
    for (asked, where), lacking in missing.items():
        path, near = sources[asked].path, nearest(lacking[0], sources[asked].layers)
        what = f"source {asked!r} ({path}) holds no {', '.join(fold_names(lacking))}"
        remedy = f"it holds {', '.join(near)}; " if near else ""
        remedy += "take these layers from another source"
        problems.append(Problem(where, what, remedy, "missing-layer"))
    return taken, problems
