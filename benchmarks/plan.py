"""Seconds that it takes to plan the largest models: `python -m benchmarks.plan`.

The headers are those of published models (tests/published.py), the rules one for all experts, and
ten a layer that name twenty experts each.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mixedprec_plugin.checkpoint.source import Source, open_source
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_preset
from mixedprec_plugin.preset.model import Preset
from tests import published

_MODELS: dict[str, Callable[[], published.Published]] = {
    "DeepSeek-V3": published.deepseek_v3,
    "Kimi-K2": published.kimi_k2,
}
_REPEATS = 3
_ALL = '  - {match: "*.mlp.experts.*", method: gptq, requantize: true}\n'


def main() -> int:
    """Print a line for each model and set of rules."""
    print("model        layers  rules  read headers s  plan s  plan s (CPU)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, make in _MODELS.items():
            made = make()
            made.write(folder / model)
            for rules in (_ALL, _ALL + published.single_expert_rules(made)):
                _measure(model, folder / model, _preset(folder, rules))
    return 0


def _preset(folder: Path, rules: str) -> Preset:
    path = folder / "preset.yaml"
    path.write_text(f"version: 1\nrules:\n{rules}", encoding="utf-8")
    return load_preset(path)


def _measure(model: str, path: Path, preset: Preset) -> None:
    reading: list[float] = []
    planning: list[tuple[float, float]] = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        source = open_source(path)
        reading.append(time.perf_counter() - start)
        start, used = time.perf_counter(), time.process_time()
        plan = _plan(preset, source)
        planning.append((time.perf_counter() - start, time.process_time() - used))
    assert not plan.errors, plan.errors[0]
    wall, cpu = min(planning)
    print(
        f"{model:<12} {len(plan.layers):>6}  {len(preset.rules):>5}  {min(reading):>14.2f}  "
        f"{wall:>6.2f}  {cpu:>12.2f}"
    )


def _plan(preset: Preset, source: Source) -> Plan:
    return resolve_plan(preset, source, Target())


if __name__ == "__main__":
    raise SystemExit(main())
