"""The methods that are tried, as a preset spells them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Method:
    """A method with the arguments that decide which kernel runs it.

    Attributes:
        title: its short name in the matrix.
        rule: what a preset says.
        stored: how the checkpoint stores the layers; `bf16` unless only calibration can make it.
    """

    title: str
    rule: str
    stored: str = "bf16"


METHODS = tuple(
    Method(*row)
    for row in (
        ("unquantized", "method: unquantized"),
        ("fp8", "method: fp8"),
        ("fp8_static", "method: fp8, activation_scheme: static", "fp8_static"),
        ("fp8_block", "method: fp8_block"),
        ("fp8_channel", "method: fp8_channel"),
        ("blockwise_int8", "method: blockwise_int8"),
        ("int8_channel", "method: int8_channel"),
        ("awq", "method: awq"),
        ("gptq_int4", "method: gptq_int4"),
        ("gptq_int8", "method: gptq_int8"),
        ("gptq_column", "method: gptq_int4, group_size: -1"),
        ("gptq_act_order", "method: gptq_int4, desc_act: true", "gptq_act_order"),
        ("humming_int3", "method: humming_int3"),
        ("nvfp4", "method: nvfp4"),
    )
)
TP_SIZES = (1, 2, 8)
