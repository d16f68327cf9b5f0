"""A rule of thumb in the place of scores: what formats and shapes alone tell.

The squared error of rounding normally distributed weights, relative to them, times the share of
tokens that a layer sees. It takes all layers for equally touchy, which they are not, and knows
nothing of activations that are quantized: a first guess, and a last resort.
Source: Malinovskii et al., "Pushing the Limits of Large Language Model Quantization via the
Linearity Theorem" (arXiv:2411.17525), where losses are such errors times a number of each layer.
"""

from __future__ import annotations

from mixedprec_plugin.families.config import count_of, text_config
from mixedprec_plugin.methods.registry import AUTO, METHODS
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.search.candidates import AS_STORED, Choices, Unit
from mixedprec_plugin.search.kept import Scores

# of two errors that formats tell of normally distributed weights, as good as the same
_ALIKE = 1.05


def guessed(choices: Choices) -> Scores:
    """A score for every option whose error the formats tell."""
    said = text_config(choices.base.source.config)
    experts = count_of(said, "num_experts", "num_local_experts", "n_routed_experts")
    share = count_of(said, "num_experts_per_tok") / experts if experts else 1.0
    found: Scores = {}
    for name, unit in choices.units.items():
        weight = share if unit.layers[0].kind == "expert" else 1.0
        for candidate in worth_trying(unit):
            option = unit.options[candidate]
            errors = [_error(layer) for layer in option.planned]
            if all(errors):
                sizes = (layer.num_weights for layer in option.planned)
                squares = (error**2 * size for error, size in zip(errors, sizes, strict=True))
                found.setdefault(name, {})[candidate] = weight * sum(squares) / unit.num_weights
    return found


def _error(layer: PlannedLayer) -> float:
    """Expected relative error of a layer's weights; 0 where nothing tells."""
    assert layer.scheme is not None
    assert layer.stored is not None
    method, arguments = layer.method, layer.scheme.arguments
    if method == AUTO:
        method, arguments = layer.stored.method, layer.stored.arguments
    if not method or method == AUTO:
        return 0.0
    error = METHODS[method].rounding(arguments).error(layer.stored.N, layer.stored.K)
    # measured: calibrated, integers in groups lose a third of what the nearest codes do
    return error / 3**0.5 if arguments.get("rounding") == "calibrated" else error


def worth_trying(unit: Unit) -> list[str]:
    """The candidates of a unit, but for those that another is smaller and no coarser than.

    Only of methods that are calibrated, which takes time: symmetric codes, say, that are stored
    beside an order which nobody needs.
    """
    # name -> rounding, error and bytes
    told: dict[str, tuple[str, float, int]] = {}
    for name, option in unit.options.items():
        scheme, stored = option.candidate.scheme, option.planned[0].stored
        if rounding := scheme.arguments.get("rounding"):
            assert stored is not None
            error = METHODS[scheme.method].rounding(scheme.arguments).error(stored.N, stored.K)
            told[name] = rounding, error, option.num_bytes

    def is_beaten(name: str) -> bool:
        rounding, error, size = told.get(name, ("", 0.0, 0))
        return any(
            how == rounding and 0 < other <= error * _ALIKE and less < size
            for how, other, less in told.values()
        )

    return [name for name in unit.options if name != AS_STORED and not is_beaten(name)]
