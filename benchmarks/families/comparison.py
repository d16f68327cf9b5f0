"""How far an engine may be from its reference, and which greedy tokens may differ."""

from __future__ import annotations

import dataclasses
import statistics

import torch

from benchmarks.families.stepwise import ROUNDING, Steps

# what four roundings to bfloat16 can do: of the logits' standard deviation, or of an input's norm.
# Between two of a layer's inputs lie a product, a norm, a sum, an activation; the same for all
# methods, because codes of the same activations are the same codes
LIMIT = 4 * ROUNDING
# two logits that are further apart than this many times the error do not change places by it
_GAP = 4.0


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far the logits of one run are from another's.

    Attributes:
        errors: root mean square of the logits' difference at each position, over the reference's
            standard deviation.
        differing: greedy tokens that differ.
        unexplained: those of them whose logits the reference holds further apart than the error,
            and one rounding of the two in each run, could bring together.
        num_tokens: greedy tokens compared.
    """

    errors: tuple[float, ...]
    differing: int
    unexplained: int
    num_tokens: int

    @property
    def error(self) -> float:
        """At the median position."""
        return statistics.median(self.errors)

    @property
    def worst(self) -> float:
        """At the worst position."""
        return max(self.errors)


@dataclasses.dataclass(frozen=True)
class Held:
    """An engine held against its reference, layer by layer.

    Attributes:
        logits: of the reference whose layers got the engine's inputs.
        steps: how those inputs differed from its own.
    """

    logits: Distance
    steps: Steps

    @property
    def error(self) -> float:
        """At the worst position, or the worst input of a layer."""
        return max(self.logits.worst, self.steps.worst)

    @property
    def is_within(self) -> bool:
        """Whether rounding explains everything: each input, each logit, expert and token."""
        found = (self.steps.elsewhere, self.steps.missing, self.logits.unexplained)
        return self.error <= LIMIT and not any(found)


def distance(got: torch.Tensor, reference: torch.Tensor, num_tokens: int) -> Distance:
    """Compare logits [T, V] with the reference's.

    Args:
        num_tokens: greedy tokens to compare: those of the last positions.
    """
    difference = got - reference
    spread = reference.std(dim=1, keepdim=True)
    by_position = (difference / spread).square().mean(1).sqrt().nan_to_num(nan=torch.inf)
    mine, theirs = got[-num_tokens:].argmax(1), reference[-num_tokens:].argmax(1)
    rows = reference[-num_tokens:]
    first, second = rows.gather(1, theirs[:, None]), rows.gather(1, mine[:, None])
    gaps = first - second
    allowed = _GAP * by_position[-num_tokens:, None] * spread[-num_tokens:]
    # the greatest logits are the ones that are rounded most
    allowed += 2 * ROUNDING * (first.abs() + second.abs())
    return Distance(
        tuple(by_position.tolist()),
        int((mine != theirs).sum()),
        int((gaps > allowed).sum()),
        num_tokens,
    )
