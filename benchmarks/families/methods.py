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
    "awq": "method: awq",
    "gptq": "method: gptq_int4",
    "gptq_int8": "method: gptq_int8",
}
# experts of one layer, from the first on, and then anew
_MIXED = ("bf16", "fp8_block", "awq", "gptq_int8", "fp8", "int8", "gptq", "bf16")
MIXED = "mixed"
COLUMNS = (*METHODS, MIXED)


def has_cell(architecture: Architecture, column: str) -> bool:
    """Whether a column means anything for an architecture."""
    return column != MIXED or bool(architecture.experts)


def preset_text(architecture: Architecture, column: str, *, whole: bool = False) -> str:
    """Write the preset of a cell.

    Args:
        whole: give the method to the layers that the plan refuses, too.
    """
    base = "fp8_block" if column == MIXED else column
    rules = [f'  - {{match: "{architecture.layers}", {METHODS[base]}}}']
    if column == MIXED:
        assert len(_MIXED) == NUM_EXPERTS
        rules += [
            f'  - {{match: "{architecture.experts.replace("{}", str(expert))}", {METHODS[method]}}}'
            for expert, method in enumerate(_MIXED)
        ]
    kept = architecture.unquantized.get(base, architecture.unquantized.get("*", ""))
    if kept and not whole and base != "bf16":
        rules.append(f'  - {{match: "{kept}", method: bf16}}')
    return "\n".join(["version: 1", "rules:", *rules, ""])
