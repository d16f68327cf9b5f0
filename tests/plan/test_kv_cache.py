"""`kv_cache` of a preset: whose scales the plan takes, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.errors import PresetError
from mixedprec_plugin.plan.kv_cache import kv_cache_line
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.presets import preset

SPELLINGS = {
    "vLLM": ("k_scale", "v_scale"),
    "SGLang": ("attn.k_scale", "attn.v_scale"),
    "ModelOpt": ("k_proj.k_scale", "v_proj.v_scale"),
    "Quark": ("k_proj.output_scale", "v_proj.output_scale"),
}
AT = "model.layers.{}.self_attn."


def write(folder: Path, writer: str = "", first: float = 0.0) -> Path:
    """A Llama of three layers; with scales of `first` and up where a writer is named."""
    tensors = llama_tensors(llama_config())
    for layer in range(3):
        for offset, name in enumerate(SPELLINGS.get(writer, ())):
            tensors[AT.format(layer) + name] = torch.tensor(first + layer + offset / 2)
    return write_checkpoint(folder, llama_config(), tensors)


def planned(folder: Path, said: str, model: str = "", scales: str = "vLLM") -> Plan:
    """A plan with a source `other` of scales 10 and up; the model's are 1 and up."""
    path = write(folder / "other", scales, 10)
    head = f"sources: {{other: {{path: {json.dumps(str(path))}}}}}\n{said}"
    rules = ('match: "*_proj", method: fp8', 'match: "*.0.mlp.*", method: bf16, source: other')
    loaded = preset(folder / "presets", *rules, head=head)
    source = open_source(write(folder / "model", model, 1))
    return resolve_plan(loaded, source, others={"other": open_source(path, "other")},
                        target=target())  # fmt: skip


def target():  # type: ignore[no-untyped-def]
    from mixedprec_plugin.methods.interface import Target

    return Target(device="cuda")


def held(plan: Plan) -> dict[str, float]:
    """Name of every scale that the plan serves -> its value."""
    assert not plan.errors, plan.errors
    return {
        name: float(tensor)
        for name, tensor in VirtualCheckpoint(plan)
        if name.endswith(("k_scale", "v_scale", "output_scale"))
    }


def expected(writer: str, first: float) -> dict[str, float]:
    return {
        AT.format(layer) + name: first + layer + offset / 2
        for layer in range(3)
        for offset, name in enumerate(SPELLINGS[writer])
    }


@pytest.mark.parametrize("theirs", SPELLINGS)
@pytest.mark.parametrize("own", ["", "vLLM", "ModelOpt"])
def test_scales_of_another_source_take_the_place_of_the_models(
    tmp_path: Path, own: str, theirs: str
) -> None:
    plan = planned(tmp_path, "kv_cache: {dtype: fp8_e4m3, scales: other}\n", own, theirs)
    assert held(plan) == expected(theirs, 10)
    line = "KV cache in fp8_e4m3, scales of 3 attention layers from other"
    assert kv_cache_line(plan) == line


@pytest.mark.parametrize("said", ["", "kv_cache: {scales: model}\n"])
@pytest.mark.parametrize("own", SPELLINGS)
def test_scales_of_the_model_are_kept(tmp_path: Path, own: str, said: str) -> None:
    plan = planned(tmp_path, said, own)
    assert held(plan) == expected(own, 1)
    line = "KV cache as --kv-cache-dtype says, scales of 3 attention layers from model"
    assert kv_cache_line(plan) == line


@pytest.mark.parametrize("own", ["", *SPELLINGS])
def test_no_scales_where_none_are_asked_for(tmp_path: Path, own: str) -> None:
    plan = planned(tmp_path, "kv_cache: {dtype: fp8_e5m2, scales: none}\n", own)
    assert held(plan) == {}
    assert kv_cache_line(plan) == "KV cache in fp8_e5m2, no scales"


def test_model_without_scales_has_no_line(tmp_path: Path) -> None:
    assert kv_cache_line(planned(tmp_path, "")) == ""


def test_source_without_scales_is_an_error(tmp_path: Path) -> None:
    (problem,) = planned(tmp_path, "kv_cache: {scales: other}\n", "vLLM", "").errors
    assert "kv_cache.scales: source 'other'" in str(problem)
    assert "holds no scales of the KV cache; name another source" in str(problem)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{scales: othr}", r"kv_cache.scales: unknown source 'othr' .*model, other, none"),
        ("{dtype: fp8}", r"not one of .*; did you mean 'fp8_e4m3' or 'fp8_e5m2'"),
        ("{dtypes: bf16}", r"unknown key 'dtypes' .expected dtype, scales"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, said: str, message: str) -> None:
    with pytest.raises(PresetError, match=message):
        planned(tmp_path, f"kv_cache: {said}\n")
