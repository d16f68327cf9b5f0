"""Exports in stock SGLang on an H100 that is played, the plugin not loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.checkpoints import write_llama
from tests.commands import converted
from tests.dryrun.matrix import prepare, run_module
from tests.presets import EXPORTED, write_preset

RULES = (*EXPORTED[:-2], EXPORTED[-1], 'match: "*.2.self_attn.o_proj", method: fp8')
PACKED = "CompressedTensorsLinearMethod/CompressedTensorsWNA16"
FP8 = "CompressedTensorsLinearMethod/CompressedTensorsW8A8Fp8"
FP4 = "CompressedTensorsLinearMethod/CompressedTensorsW4A16Fp4"
INT8 = "CompressedTensorsLinearMethod/CompressedTensorsW8A8Int8"
PLAIN = "UnquantizedLinearMethod/NoneType"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("exported")
    prepare(folder)
    model = write_llama(
        folder / "model", hidden_size=1024, intermediate_size=1024, num_attention_heads=8,
        num_key_value_heads=4, head_dim=128, vocab_size=512, tie_word_embeddings=False,
    )  # fmt: skip
    preset, flags = write_preset(folder, *RULES), ("--format", "compressed-tensors")
    converted(model, preset, folder / "exported", *flags, device="cuda")
    return run_module("exported", "H100", folder)


def test_every_layer_runs_in_the_class_that_the_export_means(found: Mapping[str, Any]) -> None:
    classes = {
        0: (FP8, FP8, PACKED, FP4),
        1: (PLAIN, PLAIN, PACKED, PACKED),
        2: (FP8, FP8, FP8, INT8),
    }
    modules = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    expected = {
        f"model.layers.{layer}.{module}": name
        for layer, names in classes.items()
        for module, name in zip(modules, names, strict=True)
    }
    assert found["runs_as"] == expected


def test_a_forward_pass_launches_those_methods_kernels(found: Mapping[str, Any]) -> None:
    assert {"jit:gptq_marlin_gemm", "deep_gemm:fp8_fp4_gemm_nt", "aten:mm",
            "aten:_scaled_mm", "sgl_kernel:int8_scaled_mm"} <= set(found["kernels"])  # fmt: skip


def test_the_plugin_has_no_part_in_it(found: Mapping[str, Any]) -> None:
    assert found["ours"] == []
