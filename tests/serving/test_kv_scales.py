"""Scales of the KV cache: each spelling reaches SGLang's parameter; what does not is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixedprec_plugin.errors import LoadError, PlanError
from tests.calibrate.models import write_model
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.commands import convert
from tests.presets import write_preset
from tests.serving.stock import load

pytestmark = pytest.mark.usefixtures("sglang_context")

LoadModel = Callable[..., Any]
ATTENTION = "model.layers.1.self_attn"
# 0.3 is none that bfloat16 holds
K, V = 0.3, 0.7
SPELLINGS = {
    "vLLM": ("k_scale", "v_scale"),
    "SGLang": ("attn.k_scale", "attn.v_scale"),
    "ModelOpt": ("k_proj.k_scale", "v_proj.v_scale"),
    "Quark": ("k_proj.output_scale", "v_proj.output_scale"),
}


@pytest.fixture
def load_scales(load_model: LoadModel, tmp_path: Path) -> Callable[..., Any]:
    """Load a Llama with such tensors at one attention; return what SGLang built there."""

    def load(scales: dict[str, torch.Tensor], rule: str = 'match: "*.mlp.*", method: fp8') -> Any:
        tensors = llama_tensors(llama_config())
        tensors |= {f"{ATTENTION}.{name}": scale for name, scale in scales.items()}
        path = write_checkpoint(tmp_path / "model", llama_config(), tensors)
        return load_model(path, write_preset(tmp_path, rule)).get_submodule(f"{ATTENTION}.attn")

    return load


@pytest.mark.parametrize("rule", ["fp8", "bf16", "awq"])
@pytest.mark.parametrize("writer", SPELLINGS)
def test_every_spelling_reaches_the_attention(
    load_scales: Callable[..., Any], writer: str, rule: str
) -> None:
    k, v = SPELLINGS[writer]
    scales = {k: torch.tensor(K), v: torch.tensor([V])}
    attention = load_scales(scales, f'match: "*.layers.*", method: {rule}')
    assert float(attention.k_scale) == attention.k_scale_float == float(torch.tensor(K))
    assert float(attention.v_scale) == attention.v_scale_float == float(torch.tensor(V))


def test_scales_at_a_module_that_is_stored_fused_reach_the_attention(
    load_model: LoadModel, tmp_path: Path
) -> None:
    config = llama_config(
        architectures=["Phi3ForCausalLM"], model_type="phi3", pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    stored = llama_tensors(config)
    tensors = {n: t for n, t in stored.items() if not n.endswith("_proj.weight")}
    for layer in range(3):
        at = f"model.layers.{layer}."
        names = [f"{at}self_attn.{n}_proj.weight" for n in "qkv"]
        tensors[f"{at}self_attn.qkv_proj.weight"] = torch.cat([stored[n] for n in names])
        names = [f"{at}mlp.{n}_proj.weight" for n in ("gate", "up")]
        tensors[f"{at}mlp.gate_up_proj.weight"] = torch.cat([stored[n] for n in names])
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            tensors[at + name] = stored[at + name]
        tensors[f"{at}self_attn.qkv_proj.k_scale"] = torch.tensor(K)
        tensors[f"{at}self_attn.qkv_proj.v_scale"] = torch.tensor(V)
    path = write_checkpoint(tmp_path / "model", config, tensors)
    model = load_model(path, write_preset(tmp_path, 'match: "*.layers.*", method: fp8'))
    attention = model.get_submodule(f"{ATTENTION}.attn")
    assert (attention.k_scale_float, attention.v_scale_float) == (
        float(torch.tensor(K)),
        float(torch.tensor(V)),
    )


def test_one_scale_for_both_is_of_both(load_scales: Callable[..., Any]) -> None:
    attention = load_scales({"kv_scale": torch.tensor(K)})
    assert attention.k_scale_float == attention.v_scale_float == float(torch.tensor(K))


def test_attention_without_scales_has_none(load_scales: Callable[..., Any]) -> None:
    assert load_scales({}).quant_method is None


def test_scale_without_its_other_half_is_refused(load_scales: Callable[..., Any]) -> None:
    with pytest.raises(PlanError, match=r"self_attn\.attn\.v_scale: 0 of 1 elements were filled"):
        load_scales({"k_proj.k_scale": torch.tensor(K)})


def test_scale_of_each_head_is_refused(load_scales: Callable[..., Any]) -> None:
    with pytest.raises(PlanError, match=r"1\.self_attn\.v_scale: is \[2\] .expected one positive"):
        load_scales({"k_scale": torch.ones(2), "v_scale": torch.ones(2)})


def test_scale_that_is_none_is_refused(load_scales: Callable[..., Any]) -> None:
    with pytest.raises(LoadError, match=r"1\.self_attn\.v_scale: is -1\.0 .expected one positive"):
        load_scales({"k_scale": torch.tensor(K), "v_scale": torch.tensor(-1.0)})


def test_scale_of_queries_which_sglang_does_not_take_is_refused(
    load_scales: Callable[..., Any],
) -> None:
    scales = {"k_scale": torch.tensor(K), "v_scale": torch.tensor(V), "q_scale": torch.tensor(1.0)}
    with pytest.raises(PlanError, match=r"self_attn\.q_scale: is in the checkpoint, but Llama"):
        load_scales(scales)


@pytest.mark.parametrize("writer", SPELLINGS)
def test_scales_of_the_source_that_the_preset_names_reach_the_attention(
    load_model: LoadModel, tmp_path: Path, writer: str
) -> None:
    """And those of the model itself do not, whatever they are called."""
    folders = {}
    for name, (spelling, factor) in {"model": ("vLLM", 2.0), "other": (writer, 1.0)}.items():
        tensors = llama_tensors(llama_config())
        for layer in range(3):
            k, v = (f"model.layers.{layer}.self_attn.{each}" for each in SPELLINGS[spelling])
            tensors |= {k: torch.tensor(K * factor), v: torch.tensor(V * factor)}
        folders[name] = write_checkpoint(tmp_path / name, llama_config(), tensors)
    head = f"sources: {{other: {{path: {folders['other']}}}}}\nkv_cache: {{scales: other}}\n"
    preset = write_preset(tmp_path, 'match: "*_proj", method: fp8', head=head)
    model = load_model(folders["model"], preset)
    for layer in range(3):
        attention = model.get_submodule(f"model.layers.{layer}.self_attn.attn")
        assert float(attention.k_scale) == attention.k_scale_float == float(torch.tensor(K))
        assert float(attention.v_scale) == attention.v_scale_float == float(torch.tensor(V))


def test_scales_that_convert_made_of_text_are_served(
    load_model: LoadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixedprec_plugin.serving import loader
    from mixedprec_plugin.serving.hooks import asked_for

    # the preset that another test served is not this folder's
    monkeypatch.setattr(loader, "_loaded", None)
    head = "kv_cache: {dtype: fp8_e4m3, scales: calibrate}\n"
    write_model(tmp_path / "model")
    preset = write_preset(tmp_path, 'match: "*", method: bf16', head=head)
    out = tmp_path / "out"
    assert convert(tmp_path / "model", preset, out, "--windows", 4, "--length", 32)[0] == 0
    stored = load_file(out / "model.safetensors")
    with asked_for():
        served = load(out, load_format="mixedprec")
    for number in range(3):
        name = f"model.layers.{number}.self_attn.attn"
        attention = served.get_submodule(name)
        assert attention.k_scale_float == float(stored[f"{name}.k_scale"])
        assert attention.v_scale_float == float(stored[f"{name}.v_scale"])
        assert attention.k_scale_float != attention.v_scale_float
    with pytest.raises(
        PlanError, match="are not calibrated while a model is loaded; run mixedprec"
    ):
        load_model(tmp_path / "model", preset)
