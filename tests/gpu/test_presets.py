"""Every shipped preset on a real GPU: its numbers and its memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixedprec_plugin.preset.load import load_preset
from tests.gpu import memory
from tests.gpu.card import PRESETS, preset_plan, why_not

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
_QUALITY = Path(__file__).resolve().parents[2] / "docs" / "quality.json"
# those for models with experts name layers that the dense demo model does not have
NAMES = sorted(
    path.stem
    for path in PRESETS.glob("*.yaml")
    if not any("experts" in p for rule in load_preset(path).rules for p in rule.patterns)
)
# of the CPU engine's perplexity; activations that are quantized make roundings turn over
_PERPLEXITY = 0.01
_MEMORY = 0.02


@pytest.fixture(params=NAMES)
def preset(request: pytest.FixtureRequest, gpu: int, demo_model: Path) -> str:
    name: str = request.param
    if reasons := why_not(preset_plan(name, demo_model, gpu), gpu):
        pytest.skip(f"this GPU does not run {name}: {'; '.join(reasons)}")
    return name


def test_distributions_are_the_references_and_the_cpu_engines(
    preset: str, demo_model: Path, gpu: int, prose: str, tmp_path: Path, report: list[str]
) -> None:
    from benchmarks.quality import QUANTIZED_INPUT_LIMIT, QUANTIZES_INPUT, WEIGHT_ONLY_LIMIT
    from tests.gpu.serving import expected, perplexity, serve

    path = PRESETS / f"{preset}.yaml"
    methods = {layer.method for layer in preset_plan(preset, demo_model, gpu).layers}
    limit = QUANTIZED_INPUT_LIMIT if methods & set(QUANTIZES_INPUT) else WEIGHT_ONLY_LIMIT
    with serve(demo_model, tmp_path / "server.log", path) as server:
        dequantized = expected(demo_model, path, prose)
        near = dequantized.nearness(dequantized.served(server), limit)
        found = perplexity(server, demo_model, prose)
    report.append(f"{preset}: PPL {found:.3f}; {near}")
    assert near.is_within, near
    entries = json.loads(_QUALITY.read_text(encoding="utf-8"))
    on_cpu = {entry["preset"]: entry["engine"] for entry in entries}
    assert preset in on_cpu, f"{_QUALITY.name} does not hold {preset}: run make quality on a CPU"
    assert found == pytest.approx(on_cpu[preset], rel=_PERPLEXITY)


def test_memory_is_what_the_plan_says(
    preset: str, demo_model: Path, gpu: int, report: list[str]
) -> None:
    planned = preset_plan(preset, demo_model, gpu).bytes_after
    found = memory.measure(demo_model, PRESETS / f"{preset}.yaml")
    grown = found["allocated"] - found["buffers"]
    report.append(
        f"{preset}: {planned:,} bytes planned, {found['parameters']:,} in parameters, "
        f"{grown:,} allocated beside {found['buffers']:,} of buffers"
    )
    assert found["parameters"] == pytest.approx(planned, rel=_MEMORY)
    assert grown == pytest.approx(planned, rel=_MEMORY)
