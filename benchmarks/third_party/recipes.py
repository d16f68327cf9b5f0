"""Which checkpoints are made, by which tool, with which arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_WINDOWS = {"windows": 24, "tokens": 256}
# malloc returns every large buffer to the system at once otherwise, and half the time goes there
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


@dataclasses.dataclass(frozen=True)
class Tool:
    """A quantization tool.

    Attributes:
        name: of requirements/NAME.txt and of its environment's folder.
        script: of the modules `quantize_SCRIPT` and `dequantize_SCRIPT`.
        variables: environment variables that it runs with.
    """

    name: str
    script: str
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One checkpoint.

    Attributes:
        name: of its folder.
        tool: who makes it.
        arguments: what the tool's script takes, as JSON.
    """

    name: str
    tool: Tool
    arguments: Mapping[str, Any]


# gptqmodel starts one worker on two cores, and then asks for two
GPTQMODEL = Tool("gptqmodel", "gptqmodel", {"GPTQMODEL_CPU_WORKERS": "2"})
LLMCOMPRESSOR = Tool("llmcompressor", "llmcompressor")
AUTO_ROUND = Tool("auto-round", "autoround", _KEEP_MEMORY)
AUTOAWQ = Tool("autoawq", "autoawq", _KEEP_MEMORY)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("gptq-int4-g128", GPTQMODEL, {"group_size": 128, "desc_act": False, **_WINDOWS}),
        Recipe(
            "gptq-int4-g128-desc-act", GPTQMODEL, {"group_size": 128, "desc_act": True, **_WINDOWS}
        ),
        Recipe("fp8-block", LLMCOMPRESSOR, {"scheme": "FP8_BLOCK"}),
        Recipe("fp8-dynamic", LLMCOMPRESSOR, {"scheme": "FP8_DYNAMIC"}),
        Recipe("w8a8-int8", LLMCOMPRESSOR, {"scheme": "W8A8"}),
        Recipe(
            "autoround-awq-int4-g128",
            AUTO_ROUND,
            {"group_size": 128, "fold": True, "windows": 4, "tokens": 256},
        ),
        # the slowest, therefore last
    )
}
