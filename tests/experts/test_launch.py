"""Launch options that do not go with experts in several schemes."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mixedprec_plugin.experts.launch import deepep_fault, why_not_composite, why_not_experts


def test_default_launch_goes():
    assert why_not_composite(SimpleNamespace(), ["awq", "bf16"]) == []
    assert why_not_experts(SimpleNamespace(moe_runner_backend="auto"), ["awq", "gptq"]) == []


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("enable_eplb", True, r"--enable-eplb True: the expert balancer moves weights"),
        ("ep_num_redundant_experts", 4, "--ep-num-redundant-experts 4: a copy of an expert"),
        ("init_expert_location", "map.json", "--init-expert-location 'map.json': a placed expert"),
        ("enable_lora", True, "--enable-lora True: LoRA replaces"),
        ("lora_paths", ["a"], r"--lora-paths \['a'\]: LoRA replaces"),
        ("moe_runner_backend", "flashinfer_cutlass", "--moe-runner-backend 'flashinfer_cutlass'"),
    ],
)
def test_options_that_need_one_scheme_are_named(field, value, text):
    (found,) = why_not_composite(SimpleNamespace(**{field: value}), ["bf16", "awq"])
    what, remedy = found
    assert re.match(text, what)
    assert "(expected " in what
    assert remedy.startswith("start without")


def test_all_faults_are_found_at_once():
    args = SimpleNamespace(ep_size=4, enable_eplb=True, ep_num_redundant_experts=2)
    assert len(why_not_composite(args)) == 2


def test_triton_serves_the_methods_that_it_has_kernels_for():
    args = SimpleNamespace(moe_runner_backend="triton")
    assert why_not_composite(args, ["bf16", "fp8", "fp8_channel", "blockwise_int8"]) == []
    ((what, _),) = why_not_composite(args, ["bf16", "awq"])
    assert what.endswith("(expected 'auto')")


def test_marlins_experts_take_no_backend_of_choice():
    args = SimpleNamespace(moe_runner_backend="triton")
    assert why_not_experts(args, ["fp8", "bf16"]) == []
    ((what, remedy),) = why_not_experts(args, ["gptq", "awq", "fp8"])
    assert what == (
        "--moe-runner-backend 'triton': SGLang does not run experts in awq and gptq in it "
        "(expected 'auto')"
    )
    assert remedy == "start without --moe-runner-backend"


def test_experts_under_auto_take_no_backend_of_choice():
    """SGLang's class chooses by what is stored; some pass a choice over without a word."""
    ((what, _),) = why_not_experts(SimpleNamespace(moe_runner_backend="triton"), ["auto"])
    assert what.endswith("SGLang does not run experts in auto in it (expected 'auto')")
    assert why_not_experts(SimpleNamespace(moe_runner_backend="auto"), ["auto", "fp8"]) == []


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("moe_a2a_backend", "deepep", "--moe-a2a-backend 'deepep': behind it experts run in"),
        ("moe_a2a_backend", "mooncake", "--moe-a2a-backend 'mooncake': where a backend"),
        ("elastic_ep_backend", "mooncake", "--elastic-ep-backend 'mooncake': experts of a lost"),
        ("dwdp_size", 2, "--dwdp-size 2: SGLang copies experts' weights by the names"),
        ("kt_weight_path", "w", "--kt-weight-path 'w': KTransformers takes over"),
        ("enable_paged_experts", True, "--enable-paged-experts True: paging experts takes over"),
    ],
)
def test_options_that_no_experts_of_a_preset_take_are_named(field, value, text):
    args = SimpleNamespace(**{field: value})
    ((what, _),) = why_not_experts(args, ["bf16"])
    assert what.startswith(text)
    assert why_not_experts(args, []) == []


_BLOCKS, _TENSOR = {"weight_block_size": [128, 128]}, {"weight_block_size": None}


@pytest.mark.parametrize(
    ("schemes", "capability", "text"),
    [
        ([("fp8", _BLOCKS), ("fp8", _BLOCKS)], 90, ""),
        ([("fp8", _BLOCKS), ("bf16", {})], 90, "behind it experts run in block FP8 alone"),
        ([("fp8", _TENSOR)], 90, "behind it experts run in block FP8 alone"),
        ([("fp8", {"weight_block_size": [64, 128]})], 90, "behind it experts run in block"),
        # without DeepGEMM, with scales of another kind, and without a GPU
        ([("fp8", _BLOCKS)], 89, "SGLang runs block FP8 behind it in DeepGEMM"),
        ([("fp8", _BLOCKS)], 100, "SGLang runs block FP8 behind it in DeepGEMM"),
        ([("fp8", _BLOCKS)], 0, "SGLang runs block FP8 behind it in DeepGEMM"),
    ],
)
def test_experts_of_a_model_in_block_fp8_alone_run_behind_deepep(schemes, capability, text):
    fault = deepep_fault(schemes, capability)
    assert fault.startswith(text)
    args = SimpleNamespace(moe_a2a_backend="deepep")
    found = why_not_experts(args, ["fp8"], why_not_deepep=fault)
    assert [what for what, _ in found] == ([f"--moe-a2a-backend 'deepep': {fault}"] if text else [])


def test_experts_are_balanced_only_where_all_layers_are_alike():
    args = SimpleNamespace(enable_eplb=True, ep_size=2)
    assert why_not_experts(args, ["fp8"]) == []
    ((what, _),) = why_not_experts(args, ["fp8", "bf16"], are_alike=False)
    assert what.startswith("--enable-eplb True: SGLang moves the experts of all layers through")


@pytest.mark.parametrize(
    ("backend", "methods", "who", "expected"),
    [
        ("deep_gemm", ["fp8", "blockwise_int8"], "blockwise_int8", "'auto' or 'triton'"),
        ("marlin", ["awq"], "awq", "'auto'"),
        ("cutlass", ["bf16", "fp8"], "bf16", "'auto' or 'deep_gemm' or 'flashinfer_cutlass'"),
        ("aiter", ["fp8"], "fp8", "'auto' or 'cutlass' or 'deep_gemm'"),
    ],
)
def test_backends_that_a_method_passes_over_are_refused(backend, methods, who, expected):
    args = SimpleNamespace(moe_runner_backend=backend)
    ((what, _),) = why_not_experts(args, methods)
    assert f"SGLang does not run experts in {who} in it (expected {expected}" in what


def test_neither_torch_nor_sglang_is_imported():
    code = (
        "import sys, mixedprec_plugin.experts.launch;"
        "sys.exit(bool({'torch', 'sglang'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
