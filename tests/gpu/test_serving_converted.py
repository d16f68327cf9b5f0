"""What `mixedprec convert` wrote, served on a real GPU: by the plugin, and by stock SGLang."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality import QUANTIZED_INPUT_LIMIT, WEIGHT_ONLY_LIMIT
from tests.commands import converted
from tests.gpu.serving import check_same, continuations, expected, is_rehearsal, serve
from tests.gpu.shards import share_scales
from tests.presets import write_preset
from tests.server.conftest import MIXED, chat

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.usefixtures("machine")]
EXPORT = Path(__file__).resolve().parents[2] / "benchmarks" / "compressed_tensors" / "export.yaml"


def convert(model: Path, preset: Path, out: Path, *more: str) -> Path:
    device = "cpu" if is_rehearsal() else "cuda"
    return converted(model, preset, out, *more, device=device)


def test_converted_checkpoint_gives_the_tokens_of_the_direct_load(
    dense: Path, tmp_path: Path, report: list[str]
) -> None:
    out = convert(dense, MIXED, tmp_path / "converted", "--max-shard-size", "50MB")
    with serve(dense, tmp_path / "direct.log", MIXED) as server:
        direct = continuations(server)
    flags = ("--load-format", "mixedprec")
    with serve(out, tmp_path / "converted.log", None, *flags) as server:
        found = continuations(server)
    check_same(found, direct, QUANTIZED_INPUT_LIMIT, "converted and direct", report)


_WEIGHT_ONLY_EXPORT = (
    'match: "*", method: unquantized',
    'match: "*.layers.{0..9}.*_proj", method: awq',
    'match: "*.layers.{10..19}.*_proj", method: gptq',
    'match: "*.layers.{20..24}.*_proj", method: gptq_int8',
)
EXPORTS = {"with-fp8": QUANTIZED_INPUT_LIMIT, "weight-only": WEIGHT_ONLY_LIMIT}


@pytest.mark.parametrize("name", EXPORTS)
def test_compressed_tensors_export_is_served_by_stock_sglang(
    name: str,
    dense: Path,
    tmp_path: Path,
    prose: str,
    monkeypatch: pytest.MonkeyPatch,
    report: list[str],
) -> None:
    preset = EXPORT
    if name == "weight-only":
        preset = write_preset(tmp_path / "presets", *_WEIGHT_ONLY_EXPORT)
    exported = convert(dense, preset, tmp_path / "exported", "--format", "compressed-tensors")
    said = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert said["quantization_config"]["quant_method"] == "compressed-tensors"
    num_shared: list[int] = []
    dequantized = expected(
        dense, preset, prose, lambda model: num_shared.append(share_scales(model))
    )
    # qkv and gate_up of the layers whose FP8 has one scale a shard
    assert num_shared == [12 if name == "with-fp8" else 0] * 2
    if is_rehearsal():
        pytest.skip("stock SGLang runs compressed-tensors on GPUs")
    monkeypatch.setenv("SGLANG_PLUGINS", "no-such-plugin")
    with serve(exported, tmp_path / "server.log") as server:
        near = dequantized.nearness(dequantized.served(server), EXPORTS[name])
        answer = chat(server)
    report.append(f"export {name} in stock SGLang: {near}, answers {answer!r}")
    assert near.is_within, f"{near}, answers {answer!r}"
