"""What SGLang calls the modules of a plan, where it is not what the checkpoint does.

The names are those that SGLang hands to a quantization config, and so those in its logs. Told for
printing only: `serving/module_names.py` asks the running model.

Source, below sglang/srt: models/mixtral.py:303 (`prefix="layers"`); models/qwen2_5_vl.py:693 and
:723, models/gemma3_mm.py:188, :198 (names of checkpoints that transformers wrote since 4.52 go
first); layers/attention/vision.py:1205, :1233.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_VISION = (
    (re.compile(r"\.attn\.qkv$"), ".attn.qkv_proj"),
    (re.compile(r"(vision_tower\..*)\.self_attn\.out_proj$"), r"\1.self_attn.proj"),
)
_QWEN_VL = (
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^model\.visual\."), "visual."),
    *_VISION,
)
_RENAMES: Mapping[str, tuple[tuple[re.Pattern[str], str], ...]] = {
    "MixtralForCausalLM": ((re.compile(r"^model\.layers\."), "layers."),),
    "Qwen2VLForConditionalGeneration": _QWEN_VL,
    "Qwen2_5_VLForConditionalGeneration": _QWEN_VL,
    "Gemma3ForConditionalGeneration": (
        (re.compile(r"^model\.language_model\."), "language_model.model."),
        (re.compile(r"^model\.vision_tower\."), "vision_tower."),
        *_VISION,
    ),
}


def sglang_name(module: str, architecture: str) -> str:
    """Name a module as SGLang does.

    Args:
        module: the plan's name, in the checkpoint's spelling, fused: `….self_attn.qkv_proj`.
        architecture: the first of config.json's `architectures`.
    """
    for pattern, replacement in _RENAMES.get(architecture, ()):
        module = pattern.sub(replacement, module)
    return module
