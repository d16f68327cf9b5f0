"""A preset from scores that `mixedprec search` kept, for `mixedprec init`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.errors import PlanError
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.search.candidates import find_choices
from mixedprec_plugin.search.finder import Budget, Search, kept_scores
from mixedprec_plugin.search.kept import Basis, KeptScores
from mixedprec_plugin.search.report import header_lines
from mixedprec_plugin.search.write import Chosen, preset_text, publish


def preset_of_scores(
    model: Source, target: Target, budget: Budget, path: Path
) -> tuple[str, Plan] | None:
    """The best preset for a budget of what needs no conversion; its text and its plan.

    Args:
        path: what it is to be called.
    Returns:
        None where nothing that was scored is so small.
    Raises:
        CheckpointError: the file of scores is damaged.
    """
    choices = find_choices(model, target)
    scores = kept_scores(choices, KeptScores(model, target.dtype, Basis()))
    try:
        found = Search(choices, at_load=True).run(budget, scores, "nats")
    except PlanError:
        return None
    about = header_lines(found, path, str(model.path))
    text = preset_text(found.choices, Chosen(found.choice, found.losses, about), {})
    with tempfile.TemporaryDirectory() as folder:
        plan = publish(text, found.choices, found.choice, {}, Path(folder) / path.name)
    return text, plan
