"""The methods that are tried, as a preset spells them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Method:
    """A method with the arguments that decide which kernel runs it."""

    title: str
    rule: str


METHODS = tuple(
    Method(title, rule)
    for title, rule in (
        ("unquantized", "method: unquantized"),
        ("fp8", "method: fp8"),
        ("fp8_block", "method: fp8_block"),
        ("blockwise_int8", "method: blockwise_int8"),
        ("awq", "method: awq"),
        ("gptq_int4", "method: gptq_int4"),
        ("gptq_int8", "method: gptq_int8"),
    )
)
TP_SIZES = (1, 2, 8)
