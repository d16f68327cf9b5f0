"""Scores by what a serving engine's layers read; no forward pass, and no gradients.

What `scores` does without gradients, of tokens that were gathered, times how much of the residual
stream is what the unit's branch adds, where that is known: the same share of error in two branches
matters as much as the branches do. Of experts the engine shows what goes in: what the down
projection reads is computed here from the other two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from rich.progress import Progress
from torch.nn.functional import silu

from mixedprec_plugin.calibrate.capture import Held, Seen
from mixedprec_plugin.calibrate.gathered import Gathered, Tokens
from mixedprec_plugin.calibrate.network import usual_device
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.compose.stream import compose_floats
from mixedprec_plugin.errors import CheckpointError, Problem
from mixedprec_plugin.families.config import text_config
from mixedprec_plugin.families.names import ExpertShard, shard_order
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.search.candidates import Choices, Unit
from mixedprec_plugin.search.finder import Way
from mixedprec_plugin.search.kept import Scores, Wanted
from mixedprec_plugin.search.scores import Scoring, fill_unseen


def way_of_gathered(choices: Choices, gathered: Gathered) -> Way:
    """Scores by what an engine gathered, and what they stand on."""
    return Way(
        "parts" if gathered.shares else "shares",
        lambda wanted, bar: score_gathered(choices, wanted, gathered, bar),
        unscored(choices, gathered),
        scored_on=f"{gathered.num_tokens:,} tokens that an engine gathered in {gathered.folder}",
    )


def unscored(choices: Choices, gathered: Gathered) -> dict[str, str]:
    """The units that cannot be scored by what was gathered, and why; an error, if none can be."""
    found = {}
    for name, unit in choices.units.items():
        if not gathered.has(unit.layers[0].module):
            found[name] = "the engine did not see what it reads"
        elif why := _why_not_experts(choices.base, unit):
            found[name] = why
    if len(found) == len(choices.units):
        what = f"does not say what any layer reads: {'; '.join(dict.fromkeys(found.values()))}"
        remedy = "search with --text, or --fast"
        raise CheckpointError(Problem(str(gathered.folder), what, remedy, "gathered"))
    return found


def _why_not_experts(plan: Plan, unit: Unit) -> str:
    if not isinstance(unit.layers[0].shard, ExpertShard):
        return ""
    said = text_config(plan.source.config)
    activation = said.get("hidden_act", "silu")
    if activation != "silu" or said.get("swiglu_limit"):
        return "what its down projection reads is not known of this activation"
    if any("bias" in layer.inputs for layer in unit.layers):
        return "what its down projection reads is not known of experts with biases"
    return ""


def score_gathered(
    choices: Choices, wanted: Wanted, gathered: Gathered, progress: Progress
) -> Iterator[Scores]:
    """Score candidates of units that can be scored, a module at a time."""
    modules: dict[str, list[PlannedLayer]] = {}
    for name in wanted:
        for layer in choices.units[name].layers:
            modules.setdefault(layer.module, []).append(layer)
    is_held = gathered.is_held_out()
    task = progress.add_task("scoring", total=len(modules))
    with Reader() as reader:
        device, target = usual_device(), choices.base.target
        scoring = Scoring(choices, wanted, reader, device)

        def weight(layer: PlannedLayer) -> torch.Tensor:
            return compose_floats(layer, target, reader)["weight"].to(device).float()

        for module, layers in modules.items():
            first = layers[0].stored
            assert first is not None
            tokens = gathered.tokens(module, first.K)
            seen: dict[str, Seen] = {}
            for own, x, held in _read_by(layers, tokens, is_held):
                down = [layer for layer in own if _is_down(layer)]
                if down:
                    gate, up = (x.to(device).float() @ weight(layer).t() for layer in own[:2])
                    seen[down[0].name] = _seen((silu(gate) * up).bfloat16().cpu(), held)
                seen |= {layer.name: _seen(x, held) for layer in own if not _is_down(layer)}
            records = [record for _, _, record in scoring(layers, seen, int(is_held.sum()))]
            share = gathered.shares.get(module, 1.0)
            found: Scores = {
                record["unit"]: {name: share * x for name, x in record["scores"].items()}
                for record in records
            }
            fill_unseen(found, choices)
            yield found
            progress.advance(task)
    progress.remove_task(task)


def _read_by(
    layers: Sequence[PlannedLayer], tokens: Tokens, is_held: torch.Tensor
) -> list[tuple[list[PlannedLayer], torch.Tensor, torch.Tensor]]:
    """Layers that read the same, what they read, and which of it is held out.

    A linear module is one of them; of experts each is, its projections in the order w1, w3, w2.
    """
    if tokens.experts is None:
        return [(list(layers), tokens.x, is_held)]
    experts: dict[int, list[PlannedLayer]] = {}
    for layer in layers:
        assert isinstance(layer.shard, ExpertShard)
        experts.setdefault(layer.shard.expert, []).append(layer)
    found = []
    for expert, own in experts.items():
        rows = (tokens.experts == expert).any(1)
        if rows.any():
            ordered = sorted(own, key=lambda layer: shard_order(layer.shard))
            found.append((ordered, tokens.x[rows], is_held[rows]))
    return found


def _is_down(layer: PlannedLayer) -> bool:
    return isinstance(layer.shard, ExpertShard) and layer.shard.projection == "w2"


def _seen(x: torch.Tensor, is_held: torch.Tensor) -> Seen:
    held = [Held(x[is_held], None)] if is_held.any() else []
    return Seen([x[~is_held]], [torch.ones(int((~is_held).sum()))], held)
