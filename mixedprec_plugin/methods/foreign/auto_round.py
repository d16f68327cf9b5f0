"""auto-round: AWQ's and GPTQ's packings under a `quantization_config` of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.methods import awq, gptq, integers
from mixedprec_plugin.methods.interface import Format
from mixedprec_plugin.methods.stored import FLOAT, Said, matches, strings

_ENCODINGS = {"auto_round:auto_awq": awq.NAME, "auto_round:auto_gptq": gptq.NAME}


def read_config(config: Mapping[str, Any], name: str) -> Said:
    facts = integers.config_facts(config)
    blocks = config.get("block_name_to_quantize")
    within = blocks.split(",") if isinstance(blocks, str) else strings(blocks)
    if within and name and not any(f"{name}.".startswith(f"{block}.") for block in within):
        return Said(FLOAT, facts)
    extra = config.get("extra_config")
    for pattern, override in extra.items() if isinstance(extra, Mapping) else ():
        if isinstance(override, Mapping) and (
            pattern == name or matches(pattern, name, whole=True)
        ):
            facts |= integers.config_facts(override)
    if facts.get("bits") in (16, 32):
        return Said(FLOAT, facts)
    packing = str(config.get("packing_format", ""))
    return Said(_ENCODINGS.get(packing), facts, packing)


FORMAT = Format(
    name="auto-round",
    read_config=dict.fromkeys(("auto-round", "auto_round", "intel/auto-round"), read_config),
)
