"""The preset that `mixedprec init` writes: found like one of `mixedprec search`, scores or not."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.errors import PlanError
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.registry import AUTO
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.search.candidates import AS_STORED, Unit, find_choices
from mixedprec_plugin.search.finder import Budget, Found, Search, kept_scores
from mixedprec_plugin.search.kept import Basis, KeptScores
from mixedprec_plugin.search.report import header_lines
from mixedprec_plugin.search.rule import guessed
from mixedprec_plugin.search.write import Chosen, preset_text, publish

# the first that serves a unit; of activations in 8-bit integers a guess knows nothing
_EIGHT_BITS = ("fp8_channel", "fp8")
_FOUR_BITS = "awq"
# a share of a guess that is worth a scheme less
_TOLERANCE = 0.05
# bits a weight of more than any quantized format
_FLOATS = 9


def preset_for(
    model: Source, target: Target, budgets: Sequence[Budget], path: Path, *, has_floats: bool
) -> tuple[Found, str, Plan]:
    """The best preset within all of some budgets, of what needs no conversion.

    It is chosen by scores that `mixedprec search` kept, or else by a rule of thumb.

    Args:
        budgets: none for the finest there is.
        path: what it is to be called.
        has_floats: whether layers that are stored in floats may stay so.
    Returns:
        what was found, the preset's text and its plan.
    Raises:
        PlanError: nothing is so small.
        CheckpointError: the file of scores is damaged.
    """
    choices = find_choices(model, target)
    kept = KeptScores(model, target.dtype, Basis())
    found = None
    if budgets and kept.path is not None:
        search, scores = Search(choices, at_load=True), kept_scores(choices, kept)
        with contextlib.suppress(PlanError):  # of what was scored nothing is so small
            found = _smallest([search.run(budget, scores, "nats") for budget in budgets])
    if found is None:
        units = {name: _usual(unit, has_floats) for name, unit in choices.units.items()}
        choices = dataclasses.replace(choices, units=units)
        search, scores = Search(choices, True, True, _TOLERANCE), guessed(choices)
        asked = budgets or [Budget(bits=2 * _FLOATS)]
        found = _smallest([search.run(budget, scores, "guesses") for budget in asked])
    about = header_lines(found, path, model.shown, "init")
    text = preset_text(found.choices, Chosen(found.choice, found.losses, about), {})
    with tempfile.TemporaryDirectory() as folder:
        plan = publish(text, found.choices, found.choice, {}, Path(folder) / path.name)
    return found, text, plan


def _smallest(found: Sequence[Found]) -> Found:
    return min(found, key=lambda one: one.point.rank_bytes)


def _usual(unit: Unit, has_floats: bool) -> Unit:
    """A unit with the methods to start from."""
    methods = {name: option.candidate.scheme.method for name, option in unit.options.items()}
    eight = next((method for method in _EIGHT_BITS if method in methods.values()), None)
    usual = (eight, _FOUR_BITS, AUTO) if eight else methods.values()
    options = {name: unit.options[name] for name, method in methods.items() if method in usual}
    if not has_floats and 8 * options[AS_STORED].num_bytes > _FLOATS * unit.num_weights:
        del options[AS_STORED]
    return dataclasses.replace(unit, options=options)
