"""How far logits may be from the reference's, and which greedy tokens may differ."""

from __future__ import annotations

import dataclasses
import statistics

import torch

# of the logits' standard deviation, at the median position; what rounding to bf16 does to it, and
# to the codes of quantized activations
LIMITS = {
    "bf16": 0.03, "awq": 0.03, "gptq": 0.03, "gptq_int8": 0.03,
    "fp8": 0.16, "fp8_block": 0.16, "int8": 0.06, "mixed": 0.16,
}  # fmt: skip
# the share of positions that may be off by more than twice the limit: where two experts are nearly
# equal, rounding decides which of them a token goes to
MAX_OUTLIERS = 0.25
# two logits that are further apart than this many times the error do not change places by it
_GAP = 4.0


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far one run is from another.

    Attributes:
        errors: root mean square of the logits' difference at each position, over the reference's
            standard deviation.
        differing: greedy tokens that differ.
        unexplained: those of them whose logits the reference holds further apart than the error
            could bring together.
        num_tokens: greedy tokens compared.
    """

    errors: tuple[float, ...]
    differing: int
    unexplained: int
    num_tokens: int

    def is_within(self, column: str) -> bool:
        """Whether a run of a column may be this far from its reference."""
        limit = LIMITS[column]
        outliers = sum(error > 2 * limit for error in self.errors)
        is_near = self.error <= limit and outliers <= MAX_OUTLIERS * len(self.errors)
        return is_near and not self.unexplained

    @property
    def error(self) -> float:
        """At the median position."""
        return statistics.median(self.errors)

    @property
    def worst(self) -> float:
        """At the worst position."""
        return max(self.errors)


def distance(got: torch.Tensor, reference: torch.Tensor, num_tokens: int) -> Distance:
    """Compare logits [T, V] with the reference's.

    Args:
        num_tokens: greedy tokens to compare: those of the last positions.
    """
    difference = got - reference
    spread = reference.std(dim=1, keepdim=True)
    by_position = (difference / spread).square().mean(1).sqrt()
    mine, theirs = got[-num_tokens:].argmax(1), reference[-num_tokens:].argmax(1)
    rows = reference[-num_tokens:]
    gaps = rows.gather(1, theirs[:, None]) - rows.gather(1, mine[:, None])
    allowed = _GAP * by_position[-num_tokens:, None] * spread[-num_tokens:]
    return Distance(
        tuple(by_position.tolist()),
        int((mine != theirs).sum()),
        int((gaps > allowed).sum()),
        num_tokens,
    )
