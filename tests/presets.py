"""Presets written in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.families.config import model_dtype
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.plan.sources import open_other_sources
from mixedprec_plugin.preset.load import load_preset
from mixedprec_plugin.preset.model import Preset

# of a model of three layers: every method that is exported as compressed-tensors
EXPORTED = (
    'match: "*", method: fp8',
    'match: "*.self_attn.*", method: fp8_block',
    'match: "*.0.mlp.*", method: awq',
    'match: "*.0.mlp.down_proj", method: nvfp4',
    'match: "*.1.mlp.*", method: gptq, group_size: -1',
    'match: "*.1.mlp.down_proj", method: gptq_int8, group_size: 64',
    'match: "*.1.self_attn.*", method: unquantized',
    'match: "*.2.mlp.*", method: fp8_channel',
    'match: "*.2.mlp.down_proj", method: int8_channel',
)


def write_preset(folder: Path, *lines: str, head: str = "") -> Path:
    """Write `preset.yaml` with the given rules, one a line: `match: "*", method: fp8`."""
    folder.mkdir(parents=True, exist_ok=True)
    rules = "".join(f"  - {{{line}}}\n" for line in lines)
    path = folder / "preset.yaml"
    path.write_text(f"version: 1\n{head}rules:\n{rules}", encoding="utf-8")
    return path


def preset(folder: Path, *lines: str, head: str = "") -> Preset:
    """Load a preset of the given rules."""
    return load_preset(write_preset(folder, *lines, head=head))


def plan(model: Path, *lines: str, head: str = "", target: Target | None = None) -> Plan:
    """Plan the given rules over a checkpoint."""
    loaded = preset(model.parent / "presets", *lines, head=head)
    return resolve_plan(loaded, open_source(model), target or Target())


def problem_texts(made: Plan) -> list[str]:
    """Every problem of a plan as `severity: text`."""
    return [f"{problem.severity}: {problem}" for problem in made.problems]


def open_virtual_checkpoint(
    model_path: str | Path, preset_path: str | Path, target: Target | None = None
) -> Any:
    """The virtual checkpoint of a preset over a checkpoint folder.

    Args:
        target: what to plan for; CUDA, one rank and the checkpoint's own dtype if None.
    """
    from mixedprec_plugin.compose.stream import VirtualCheckpoint

    made, model = load_preset(preset_path), open_source(model_path)
    target = target or Target(dtype=model_dtype(model.config))
    return VirtualCheckpoint(resolve_plan(made, model, target, open_other_sources(made)))
