"""The preset to plan with: the one that was named, or the one that the checkpoint carries."""

from __future__ import annotations

from collections.abc import Sequence

from mixedprec_plugin.checkpoint.converted import embedded_preset
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.preset.load import load_preset, load_resolved
from mixedprec_plugin.preset.model import Preset


def preset_for(named: str, model: Source, overrides: Sequence[str], flag: str) -> Preset:
    """Load the preset that was named, or else the one that the model's checkpoint carries.

    Args:
        named: a path or a packaged preset's name; empty for none.
        flag: what names a preset, for the error.
    Raises:
        UsageError: none was named, and the checkpoint carries none.
        PresetError: with every problem of the preset.
    """
    if named:
        return load_preset(named, overrides)
    resolved = embedded_preset(model.quantization_config)
    if resolved is None:
        text = f"is missing, and {model.path} carries no preset of its own"
        remedy = "name a preset, or a checkpoint that mixedprec convert wrote"
        raise UsageError(Problem(flag, text, remedy, "no-preset"))
    where = f"{model.path / 'config.json'}: quantization_config.preset"
    return load_resolved(resolved, where, overrides)
