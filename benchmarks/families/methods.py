"""The columns of the table, and the preset of each cell."""

from __future__ import annotations

from benchmarks.families.architectures import NUM_EXPERTS, Architecture

# column -> what a rule says
METHODS = {
    "bf16": "method: bf16",
    "fp8": "method: fp8",
    "fp8_channel": "method: fp8_channel",
    "fp8_block": "method: fp8_block",
    "int8": "method: blockwise_int8",
    "int8_channel": "method: int8_channel",
    "nvfp4": "method: nvfp4",
    "mxfp4": "method: mxfp4",
    "awq": "method: awq",
    "gptq": "method: gptq_int4",
    "gptq_int8": "method: gptq_int8",
    "humming": "method: humming",
}
# columns of methods that run experts alone, or everything else
_EXPERTS_ALONE, _NO_EXPERTS = ("mxfp4",), ("humming",)
# experts of one layer, from the first on, and then anew
_MIXED = ("bf16", "fp8_block", "awq", "gptq_int8", "fp8", "int8", "gptq", "bf16")
MIXED = "mixed"
COLUMNS = (*METHODS, MIXED)


def has_cell(architecture: Architecture, column: str) -> bool:
    """Whether a column means anything for an architecture."""
    return column not in (MIXED, *_EXPERTS_ALONE) or bool(architecture.experts)


def kept_patterns(architecture: Architecture, column: str) -> list[str]:
    """The layers that stay bf16 under a method, because the plan refuses them."""
    if column in ("bf16", *_EXPERTS_ALONE):
        return []
    column = "fp8_block" if column == MIXED else column
    kept = [architecture.unquantized.get(column, architecture.unquantized.get("*", ""))]
    if column in _NO_EXPERTS:
        kept.append(architecture.experts.replace("{}", "*"))
    return [pattern for pattern in kept if pattern]


def preset_text(architecture: Architecture, column: str, *, whole: bool = False) -> str:
    """Write the preset of a cell.

    Args:
        whole: give the method to the layers that the plan refuses, too.
    """
    base = "fp8_block" if column == MIXED else column
    layers = architecture.layers
    if column in _EXPERTS_ALONE:
        layers = architecture.experts.replace("{}", "*")
    rules = [f'  - {{match: "{layers}", {METHODS[base]}}}']
    if column == MIXED:
        assert len(_MIXED) == NUM_EXPERTS
        rules += [
            f'  - {{match: "{architecture.experts.replace("{}", str(expert))}", {METHODS[method]}}}'
            for expert, method in enumerate(_MIXED)
        ]
    kept = [] if whole else kept_patterns(architecture, column)
    rules += [f'  - {{match: "{pattern}", method: bf16}}' for pattern in kept]
    return "\n".join(["version: 1", "rules:", *rules, ""])
