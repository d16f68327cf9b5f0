"""The checkpoints of a preset: the model's own and those under `sources:`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mixedprec_plugin.checkpoint.source import Source, open_source
from mixedprec_plugin.errors import CheckpointError, Problem
from mixedprec_plugin.preset.model import Preset


def open_other_sources(preset: Preset, *, everything: bool = False) -> Mapping[str, Source]:
    """Open every source that the preset takes layers or scales from, but for the model.

    Args:
        everything: those that no rule names as well.
    Raises:
        CheckpointError: with the problems of all of them, at their lines in the preset.
    """
    taken = {rule.scheme.source for rule in preset.rules} | {preset.kv_cache.scales or "model"}
    used = {*(preset.sources if everything else taken)} - {"model"}
    sources: dict[str, Source] = {}
    problems: list[Problem] = []
    for name in sorted(used):
        reference = preset.sources[name]
        try:
            sources[name] = open_source(reference.path, name, reference.revision)
        except CheckpointError as error:
            for p in map(preset.conceal, error.problems):
                problems.append(dataclasses.replace(p, where=f"{reference.location}: {p.where}"))
    if problems:
        raise CheckpointError(problems)
    return sources
