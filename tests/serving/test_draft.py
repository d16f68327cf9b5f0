"""A draft model of speculative decoding: as SGLang loads it, or by the preset's section `draft`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixedprec_plugin.errors import PlanError
from tests.checkpoints import write_llama
from tests.presets import write_preset
from tests.serving.stock import load

pytestmark = pytest.mark.usefixtures("sglang_context")


def test_draft_model_is_loaded_as_sglang_would(llama: Path) -> None:
    from safetensors.torch import load_file
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    from mixedprec_plugin.serving.loader import is_mixed_precision

    # the preset of the model that it drafts for
    extra = {"mixedprec_config": "fp8-block"}
    model = load(llama, is_draft=True, load_format="mixedprec", model_loader_extra_config=extra)
    assert not is_mixed_precision(model)
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(down.quant_method, UnquantizedLinearMethod)
    stored = load_file(llama / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert down.weight.equal(stored)


@pytest.fixture
def preset(llama: Path, tmp_path: Path) -> Path:
    path = write_preset(tmp_path, 'match: "*", method: fp8')
    draft = 'draft: {rules: [{match: "*.down_proj", method: fp8_block}]}\n'
    path.write_text(path.read_text() + draft)
    return path


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other tests loaded in this process was not loaded."""
    from mixedprec_plugin.serving import loader

    monkeypatch.setattr(loader, "_loaded", None)
    monkeypatch.setattr(loader, "_loaded_draft", None)


@pytest.mark.usefixtures("forgetful")
def test_section_says_what_the_draft_model_runs_in(
    llama: Path, preset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file

    caplog.set_level("INFO")
    plan_path = tmp_path / "plan.json"
    extra = {"mixedprec_config": str(preset), "mixedprec_plan": str(plan_path)}
    how = {"load_format": "mixedprec", "model_loader_extra_config": extra}
    model, draft = load(llama, **how), load(llama, is_draft=True, **how)
    assert "the draft model, by the preset's section draft" in caplog.text
    down, up = (f"model.layers.1.mlp.{name}" for name in ("down_proj", "gate_up_proj"))
    assert draft.get_submodule(down).quant_method.quant_config.weight_block_size == [128, 128]
    stored = load_file(llama / "model.safetensors")
    gate = stored["model.layers.1.mlp.gate_proj.weight"]
    assert draft.get_submodule(up).weight[: len(gate)].equal(gate)
    # the model's own plan stays what it was
    assert model.get_submodule(down).quant_method.quant_config.weight_block_size is None
    methods = {x["name"]: x["method"] for x in json.loads(plan_path.read_text())["layers"]}
    assert methods["model.layers.1.mlp.gate_proj"] == "fp8"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "draft: SGLang makes no draft model that is known of --model-path's own layers"),
        (
            {"speculative_draft_model_quantization": "fp8"},
            "--speculative-draft-model-quantization: 'fp8': the preset's section draft says",
        ),
        (
            {"speculative_draft_load_format": "dummy"},
            "--speculative-draft-load-format: 'dummy': the preset's section draft says how",
        ),
    ],
)
def test_launch_that_the_section_does_not_go_with_is_refused(
    llama: Path, preset: Path, tmp_path: Path, fields: dict[str, str], message: str
) -> None:
    found = problems(llama, preset, llama if not fields else tmp_path / "other", **fields)
    assert len(found) == 1
    assert message in found[0]


def test_plan_of_the_draft_is_checked_at_start(llama: Path, preset: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other", intermediate_size=192)
    (problem,) = problems(llama, preset, other)
    assert problem.startswith("model.layers.0-2.mlp.down_proj: ")
    assert "192" in problem


def problems(model: Path, preset: Path, draft: Path, **fields: str) -> list[str]:
    """What starting with a draft model finds, beside what a CPU has no means for."""
    from mixedprec_plugin.serving.early import check_early

    args = SimpleNamespace(
        load_format="mixedprec", model_path=str(model), dtype="bfloat16", tp_size=1,
        model_loader_extra_config={"mixedprec_config": str(preset)},
        speculative_algorithm="STANDALONE", speculative_draft_model_path=str(draft), **fields,
    )  # fmt: skip
    with pytest.raises(PlanError) as caught:
        check_early(args)
    texts = [str(problem) for problem in caught.value.problems]
    return [text for text in texts if "needs sgl-kernel" not in text]
