"""A checkpoint in NVFP4 and FP8 as ModelOpt writes it, loaded on the CPU platform."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.families.architectures import ARCHITECTURES
from benchmarks.families.checkpoints import make_checkpoint
from mixedprec_plugin.cli.main import main
from tests.compose.test_nvfp4_experts import write_mixed
from tests.presets import write_preset
from tests.tensors import as_integers

pytestmark = pytest.mark.usefixtures("sglang_context")


@pytest.mark.parametrize("is_kept", [True, False])
def test_experts_are_loaded_with_and_without_their_input_scales(
    load_model: Callable[..., Any], tmp_path: Path, is_kept: bool
) -> None:
    """Layers that no rule matches are served as they are stored, input scales and all."""
    mixed, _ = write_mixed(tmp_path)
    rule = 'match: "*.no_such.*", optional: true' if is_kept else 'match: "*.experts.*"'
    served = load_model(mixed, write_preset(tmp_path, f"{rule}, method: nvfp4"))
    experts = served.model.layers[1].block_sparse_moe.experts
    assert type(experts.quant_method).__name__ == "ModelOptNvFp4FusedMoEMethod"
    stored = load_file(mixed / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2"
    up = stored[f"{name}.w3.weight_scale"]
    half = experts.w13_weight_scale.shape[1] // 2
    assert torch.equal(as_integers(experts.w13_weight_scale[2, half:]), as_integers(up))
    assert torch.equal(experts.w2_weight[2], stored[f"{name}.w2.weight"])
    assert experts.w2_weight_scale_2[2] == stored[f"{name}.w2.weight_scale_2"]
    assert hasattr(experts, "w13_input_scale") == is_kept
    if is_kept:
        assert bool((experts.w13_input_scale == stored[f"{name}.w1.input_scale"]).all())


def _converted(family: str, folder: Path, rule: str) -> Path:
    """A small random model of a family with two blocks, converted by a rule."""
    (architecture,) = (x for x in ARCHITECTURES if x.name == family)
    model = make_checkpoint(architecture, folder / "model")
    preset = write_preset(folder / "nvfp4", rule)
    flags = ["--model", str(model), "--preset", str(preset), "--device", "cpu"]
    assert not main(["convert", *flags, "--out", str(folder / "out")])
    (folder / "out" / "mixedprec_provenance.json").unlink()
    return folder / "out"


def test_shards_of_what_is_built_as_one_whole_keep_their_own_scale(
    load_model: Callable[..., Any], tmp_path: Path
) -> None:
    """q_a and kv_a of an MLA block, whose module would have the scale of the last."""
    folder = _converted("DeepSeek-V3", tmp_path, 'match: "*.{q_a_proj,kv_a_*}", method: nvfp4')
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn."
    # of the two, the last has the smaller one
    tensors[f"{name}q_a_proj.weight_scale_2"] *= 4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    served = load_model(folder, write_preset(tmp_path, 'match: "*.q_a_proj", method: nvfp4'))
    module = served.model.layers[0].self_attn.fused_qkv_a_proj_with_mqa
    assert module.weight_scale_2[0] == module.weight_scale_2[1]
    scales = module.weight_scale.float() * module.weight_scale_2[0]
    stored = torch.cat([
        tensors[f"{name}{shard}.weight_scale"].float() * tensors[f"{name}{shard}.weight_scale_2"]
        for shard in ("q_a_proj", "kv_a_proj_with_mqa")
    ])  # fmt: skip
    assert torch.equal(scales, stored)


def test_what_is_stored_as_one_matrix_has_one_scale_for_all_shards(
    load_model: Callable[..., Any], tmp_path: Path
) -> None:
    folder = _converted("Phi-3", tmp_path, 'match: "*", method: nvfp4')
    tensors = load_file(folder / "model.safetensors")
    served = load_model(folder, write_preset(tmp_path, 'match: "*.qkv_proj", method: nvfp4'))
    module, name = served.model.layers[0].self_attn.qkv_proj, "model.layers.0.self_attn.qkv_proj"
    assert module.weight_scale_2.tolist() == 3 * [float(tensors[f"{name}.weight_scale_2"])]
    assert torch.equal(module.weight, tensors[f"{name}.weight"])
