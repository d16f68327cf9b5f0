"""Linear attention and Mamba in a plan: modules of several layers, and numbers kept in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan
from tests.checkpoints import write_checkpoint
from tests.headers import write_headers
from tests.presets import plan, problem_texts

BLOCK = "model.language_model.layers.0."
GDN = f"{BLOCK}linear_attn."
# of Qwen/Qwen3.5-27B: 16 heads of keys and 48 of values, 128 wide
SIZES = {
    "linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "hidden_size": 5120,
}  # fmt: skip
WIDTHS = {"in_proj_qkv": 2 * 2048 + 6144, "in_proj_z": 6144, "in_proj_b": 48, "in_proj_a": 48}


def gdn(folder: Path, **sizes: int) -> Path:
    """A module of linear attention; `sizes` overwrite what its config.json says."""
    text = {"model_type": "qwen3_5_text", **SIZES, **sizes}
    config = {"model_type": "qwen3_5", "text_config": text, "torch_dtype": "bfloat16"}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{GDN}{name}.weight": ("BF16", (N, 5120)) for name, N in WIDTHS.items()
    }
    return write_headers(folder / "model", config, tensors)


@pytest.mark.parametrize(
    ("one", "other", "module"),
    [("in_proj_qkv", "in_proj_z", "in_proj_qkvz"), ("in_proj_b", "in_proj_a", "in_proj_ba")],
)
def test_projections_that_sglang_joins_need_one_method(
    tmp_path: Path, one: str, other: str, module: str
) -> None:
    model = gdn(tmp_path)
    made = plan(model, f'match: "*.{one}", method: fp8_channel')
    (problem,) = made.errors
    assert (problem.where, problem.rule) == (f"{GDN}{module}", "fused-conflict")
    assert f"fp8_channel for {one} (rule 0, '*.{one}'), as stored for {other}" in problem.what
    joined = plan(model, f'match: "*.{{{one},{other}}}", method: fp8_channel')
    assert not joined.errors
    assert [layer.name for layer in joined.modules[f"{GDN}{module}"]] == [GDN + one, GDN + other]


def test_blocks_must_fit_each_part_of_a_projection(tmp_path: Path) -> None:
    rule = 'match: "*.in_proj_{qkv,z}", method: fp8_block'
    assert not plan(gdn(tmp_path / "fits"), rule).errors
    # 16 heads of 128 on 32 ranks: half a head each, though qkv and z are multiples of 128 there
    texts = problem_texts(plan(gdn(tmp_path / "ranks"), rule, target=Target(tp_size=32)))
    assert any("N = 64 per rank of a shard" in text for text in texts)


def test_projection_of_another_size_than_its_heads_is_refused(tmp_path: Path) -> None:
    made = plan(gdn(tmp_path, linear_num_key_heads=8), 'match: "*", method: fp8_block')
    assert any("is stored fused with 10240 rows" in str(problem) for problem in made.errors)


@pytest.mark.parametrize(
    ("method", "is_refused"),
    [("awq", True), ("gptq", True), ("fp8", True), ("fp8_block", False), ("fp8_channel", False)],
)
def test_packed_and_single_scales_of_qwen3_next_are_refused(
    tmp_path: Path, method: str, is_refused: bool
) -> None:
    """models/qwen3_next.py:311 reads `module.weight`, :338 wants a tensor of its whole shape."""
    config = {**SIZES, "model_type": "qwen3_next", "torch_dtype": "bfloat16",
              "architectures": ["Qwen3NextForCausalLM"]}  # fmt: skip
    name = "model.layers.0.linear_attn.in_proj_qkvz"
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {f"{name}.weight": ("BF16", (16384, 5120))}
    model = write_headers(tmp_path / "model", config, tensors)
    errors = plan(model, f'match: "*.in_proj_qkvz", method: {method}').errors
    told = [problem for problem in errors if problem.rule == "family"]
    assert [problem.where for problem in told] == [name] * is_refused
    if told:
        assert told[0].remedy == "use method: fp8_block or fp8_channel"


FLOAT32 = {
    f"{GDN}A_log": 48, f"{GDN}norm.weight": 128, f"{BLOCK}mixer.D": 8, f"{BLOCK}mixer.dt_bias": 8,
    f"{BLOCK}mlp.gate.e_score_correction_bias": 4, f"{BLOCK}mlp.expert_bias": 4,
}  # fmt: skip
USUAL = {f"{BLOCK}input_layernorm.weight": 64, f"{BLOCK}self_attn.q_proj.bias": 64}


def kept(folder: Path, declared: str) -> tuple[Plan, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        n: torch.randn(size, generator=generator) for n, size in {**FLOAT32, **USUAL}.items()
    }
    tensors[f"{BLOCK}self_attn.q_proj.weight"] = torch.randn(64, 64, generator=generator)
    tensors[f"{BLOCK}some.new_state"] = torch.randn(8, generator=generator)
    config: dict[str, Any] = {"model_type": "qwen3_5_text", "torch_dtype": declared}
    model = write_checkpoint(folder / "model", config, tensors)
    return plan(model, 'match: "*", method: bf16', target=Target("cpu", dtype="BF16")), tensors


@pytest.mark.parametrize("declared", ["bfloat16", "float32"])
def test_float32_that_models_keep_stays_to_the_last_bit(tmp_path: Path, declared: str) -> None:
    made, tensors = kept(tmp_path, declared)
    served = dict(iter(VirtualCheckpoint(made)))
    for name in FLOAT32:
        assert served[name].dtype == torch.float32, name
        assert torch.equal(served[name], tensors[name]), name
    for name in USUAL:
        assert torch.equal(served[name], tensors[name].bfloat16()), name


def test_other_float32_is_kept_where_the_checkpoint_is_of_16_bits(tmp_path: Path) -> None:
    name = f"{BLOCK}some.new_state"
    for declared, dtype in (("bfloat16", torch.float32), ("float32", torch.bfloat16)):
        made, _ = kept(tmp_path / declared, declared)
        assert dict(iter(VirtualCheckpoint(made)))[name].dtype == dtype


@pytest.mark.parametrize(
    "router", ["router.layer", "router.gate", "router.classifier", "gate.wg", "gate", "router"]
)
def test_routers_stay_unquantized_under_whatever_name(tmp_path: Path, router: str) -> None:
    """GraniteMoE's, AFMoE's, LongCat's, Hunyuan's, and the usual two."""
    moe = "model.layers.0.block_sparse_moe."
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{moe}{router}.weight": ("BF16", (128, 256)),
        f"{moe}input_linear.weight": ("BF16", (128, 256, 256)),
        f"{moe}output_linear.weight": ("BF16", (128, 256, 128)),
        f"{moe}shared_mlp.gate_proj.weight": ("BF16", (256, 256)),
    }
    model = write_headers(tmp_path / "model", {"model_type": "granitemoe"}, tensors)
    made = plan(model, 'match: "model.layers.*", method: fp8_channel')
    assert not made.errors
    actions = {layer.name.removeprefix(moe): (layer.kind, layer.action) for layer in made.layers}
    assert actions == {
        router: ("router", "as stored"), "input_linear": ("other", "as stored"),
        "output_linear": ("other", "as stored"), "shared_mlp.gate_proj": ("linear", "quantize"),
    }  # fmt: skip
