"""A quantized `lm_head` on disk: written, opened again, exported, verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import preset_for
from tests.checkpoints import write_llama
from tests.commands import converted, run
from tests.presets import write_preset

RULES = ('match: "*", method: fp8', 'match: "lm_head", method: gptq, group_size: 64')
UNTIED = "untie_lm_head: true\n"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_head_that_was_untied_is_stored_and_config_json_says_so(
    tmp_path: Path, device: str
) -> None:
    model = write_llama(tmp_path / "model")
    preset = write_preset(tmp_path, *RULES, head=UNTIED)
    out = converted(model, preset, tmp_path / "out", device=device)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "untie_lm_head" not in json.dumps(config)
    source = open_source(out)
    plan = resolve_plan(preset_for("", source, (), "preset"), source, Target())
    assert not plan.errors
    head = plan.by_name["lm_head"]
    assert (head.action, head.method, plan.tied) == ("as stored", "gptq", {})
    # what the plan counted before it was written
    named = {f"lm_head.{suffix}": tensor for suffix, tensor in head.inputs.items()}
    assert head.bytes_after == sum(tensor.num_bytes for tensor in named.values())
    assert source.tensors.keys() >= named.keys()


def test_head_is_verified_against_the_embedding_that_it_was(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    preset = write_preset(tmp_path, *RULES, head=UNTIED)
    out = converted(model, preset, tmp_path / "out")
    code, text, _ = run("verify", "--model", out, "--reference", model, "--json")
    assert code == 0, text
    entry = next(x for x in json.loads(text)["layers"] if x["layer"] == "lm_head")
    assert 0.05 < entry["relative_error"] < 0.2


def test_exported_head_is_a_target_and_not_ignored(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    preset = write_preset(tmp_path, *RULES, head=UNTIED)
    out = converted(model, preset, tmp_path / "out", "--format", "compressed-tensors")
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    named = [g for g in said["config_groups"].values() if "lm_head" in g["targets"]]
    assert [group["format"] for group in named] == ["pack-quantized"]
    assert "lm_head" not in said["ignore"]
    assert "lm_head.weight_packed" in open_source(out).tensors
