"""What layers of several sources need to be one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.checkpoint.values import Values
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.recognition import FormatCache
from mixedprec_plugin.plan.biases import settle_biases
from mixedprec_plugin.plan.compatibility import check_sources
from mixedprec_plugin.plan.coupling import Coupling
from mixedprec_plugin.plan.matching import Matches
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.plan.pairs import Pairs
from mixedprec_plugin.preset.model import Preset


def settle_sources(
    preset: Preset,
    layers: Sequence[PlannedLayer],
    sources: Mapping[str, Source],
    target: Target,
    matches: Matches,
    tied: Mapping[str, str],
    formats: FormatCache,
) -> tuple[list[PlannedLayer], list[Problem]]:
    """Make layers of several sources fit each other; layers of one source are left as they are.

    Args:
        preset: for `trust_sources` and the lines of its sources.
        layers: as the rules have them.
        sources: name -> checkpoint.
        target: whose dtype norms and biases are served in.
        matches: what the rules match.
        tied: tied layer name -> the layer whose weight it shares.
        formats: the sources' formats.
    Returns:
        the layers, with norms and biases where they belong and consumers rescaled, and what is
        wrong. Sources of different models are only told to be so: nothing else can be said of them.
    Raises:
        CheckpointError: a small tensor, or a layer of a pair, cannot be read.
    """
    if len({sources[layer.source].path for layer in layers}) < 2:
        return list(layers), []
    values = Values()
    problems = check_sources(preset, layers, sources, values, formats)
    if any(problem.severity == "error" for problem in problems):
        return list(layers), problems
    settled, wrong = settle_biases(layers, sources["model"], target, values)
    problems += wrong
    trusted = preset.trust_sources
    coupling = Coupling(settled, sources, matches, tied, values, target.dtype, trusted=trusted)
    problems += coupling.settle()
    norms = {name: unit.norm for unit in coupling.units for name in unit.consumers}
    offset = family_of(sources["model"].config).norm_offset or 0.0
    pairs = Pairs(coupling.layers, sources, norms, offset, values, formats, trusted=trusted)
    problems += pairs.check()
    return list(coupling.layers.values()), problems
