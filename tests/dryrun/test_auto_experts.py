"""Experts under `method: auto` over other tools' formats, on cards that are played."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from tests.checkpoint.peers import FOLDERS
from tests.dryrun.matrix import prepare, run_module

_MARLIN, _TRITON = "jit:moe_wna16_marlin_gemm", "triton:fused_moe_kernel"
# class, the kernel that multiplies, what becomes of new weights
AWQ = ("AWQMoEMethod/RepairedAWQMoEScheme", _MARLIN, "refused")
GPTQ = ("GPTQMarlinMoEMethod/RepairedGPTQMarlinMoEScheme", _MARLIN, "refused")
WNA16 = ("CompressedTensorsFusedMoEMethod/CompressedTensorsWNA16MoE", _MARLIN, "taken")
FP8 = ("CompressedTensorsFusedMoEMethod/CompressedTensorsW8A8Fp8MoE", _TRITON, "taken")
FP4 = ("CompressedTensorsFusedMoEMethod/CompressedTensorsW4A16Nvfp4MoE", _MARLIN, "refused")
W8A8 = r"CompressedTensorsConfig: The W8A8Int8 Fused MoE scheme is implemented only for NPU"
# peer -> the same, or why it is refused
RUNS: Mapping[str, Any] = {
    "autoawq-g64": AWQ,
    "autoround-awq-asym-g64": AWQ,
    "autoround-gptq-g64": GPTQ,
    "autoround-int8": W8A8,
    "autoround-native-g64": GPTQ,
    # SGLang's class has no place for the zero points of what it takes for symmetric
    "autoround-sym-awqpack-g64": "has no parameter 'w2_qzeros' in MoeWNA16Method",
    "bf16": ("UnquantizedFusedMoEMethod", _TRITON, "taken"),
    "compressedtensors-nvfp4": FP4,
    "deepseek": ("Fp8MoEMethod", _TRITON, "taken"),
    "gptqmodel-asym-g64": "SGLang runs GPTQ only in Marlin's kernels",
    "gptqmodel-fp8-row": "SGLang's class for 'fp8' needs activation_scheme",
    "gptqmodel-gptq-g64": GPTQ,
    "llmcompressor-fp8-block": FP8,
    "llmcompressor-fp8-dynamic": FP8,
    "llmcompressor-w4a16-asym-g64": "SGLang reads the zero points of such experts as if they were",
    "llmcompressor-w4a16-g64": WNA16,
    "llmcompressor-w8a8-int8": W8A8,
    "modelopt-nvfp4": ("ModelOptNvFp4FusedMoEMethod", _MARLIN, "refused"),
}
# on a GPU that computes in FP4
ON_B200: Mapping[str, Any] = {
    **RUNS, "modelopt-nvfp4": "experts with input scales run in FlashInfer's kernels on compute cap"
}  # fmt: skip
_IN_FP8 = ("deepseek", "llmcompressor-fp8-block", "llmcompressor-fp8-dynamic")

Results = tuple[str, Mapping[str, Any]]


@pytest.fixture(scope="module", params=["H100", "A100", "B200"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("auto_experts")
    prepare(folder)
    return request.param, run_module("auto_experts", request.param, folder)


def test_every_peer_runs_in_sglangs_own_class_or_is_refused(results: Results) -> None:
    title, found = results
    assert set(RUNS) == {*FOLDERS, "deepseek"}
    for peer, expected in (ON_B200 if title == "B200" else RUNS).items():
        for tp_size in (1, 2):
            got = found[f"{peer} {tp_size}"]
            if title == "A100" and peer in _IN_FP8:
                continue
            assert not got.get("broken"), got["broken"]
            if isinstance(expected, str):
                # by the plan, or where SGLang's own class must say so by the start
                (refused,) = got["foretold"] or [got["refused"]]
                assert re.search(expected, refused), refused
                assert refused.startswith("block.mlp.experts"), refused
                continue
            assert not got["foretold"], got["foretold"]
            runs_as, kernel, again = expected
            assert got.get("runs_as") == runs_as, (peer, got)
            matmuls = {name for name in got["kernels"] if name in (_MARLIN, _TRITON)}
            assert matmuls == {kernel}, (peer, got["kernels"])
            assert ("ranks:all_reduce" in got["kernels"]) == (tp_size > 1)
            assert got["again"] == again, peer


def test_plan_refuses_fp8_where_triton_does_not_compile_it(results: Results) -> None:
    title, found = results
    for peer in _IN_FP8:
        for tp_size in (1, 2):
            foretold = found[f"{peer} {tp_size}"]["foretold"]
            assert bool(foretold) == (title == "A100"), (peer, foretold)
            assert all("compute capability" in text for text in foretold)


def test_parameters_are_of_the_ranks_sizes_and_indices_without_order_empty(
    results: Results,
) -> None:
    _, found = results
    held = found["llmcompressor-w4a16-g64 2"]["parameters"]
    assert held["layer.w13_weight_packed"] == "int32 [4, 64, 1024]"
    assert held["layer.w2_weight_scale"] == "bfloat16 [4, 8, 512]"
    assert held["layer.w13_weight_g_idx"] == "int32 [4, 0]"
    held = found["act order, in integers"]["parameters"]
    assert held["layer.w13_weight_g_idx"] == "int32 [4, 512]"
    assert held["layer.w13_g_idx_sort_indices"] == "int32 [4, 0]"
    assert found["gptqmodel-gptq-g64 1"]["parameters"]["layer.w13_scales"].startswith("bfloat16")


def test_groups_that_tritons_kernel_takes_run_in_it_on_10_0(results: Results) -> None:
    """compressed_tensors.py:927; what it puts in the place of a parameter takes no new weights."""
    title, found = results
    got = found["groups of 128"]
    scheme = "CompressedTensorsWNA16TritonMoE" if title == "B200" else "CompressedTensorsWNA16MoE"
    assert got.get("runs_as") == f"CompressedTensorsFusedMoEMethod/{scheme}", got
    kernel = "triton:fused_moe_kernel_gptq_awq" if title == "B200" else _MARLIN
    assert kernel in got["kernels"]
    assert got["again"] == ("refused" if title == "B200" else "taken")


def test_act_order_runs_and_takes_no_new_weights(results: Results) -> None:
    """What sorts them took the place of the group indices."""
    _, found = results
    got = found["act order, in integers"]
    assert (got.get("runs_as"), got.get("again")) == (WNA16[0], "refused"), got


def test_order_that_sglang_spells_as_config_json_does_leaves_a_rank_its_own_scales(
    results: Results,
) -> None:
    """CompressedTensorsWNA16MoE.create_weights knows `static`, and not its other name, `weight`."""
    _, found = results
    got = found["weights in static order, two ranks"]
    assert got.get("runs_as") == WNA16[0], got
    assert got["parameters"]["layer.w2_weight_scale"] == "bfloat16 [4, 8, 512]"


def test_one_group_of_the_size_that_the_config_names_is_no_other_format(results: Results) -> None:
    _, found = results
    assert found["one group"].get("runs_as") == WNA16[0], found["one group"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("act order, in integers, two ranks", 'where config.json says actorder: "group"'),
        ("act order, by its other name", "ignores the order of groups of such experts unless"),
        ("weights in order, two ranks", 'where config.json says actorder: "weight"'),
        ("dynamic act order", "dynamic says desc_act True of its experts, and SGLang does not ask"),
        ("half a group", "K = 96 per rank is not a multiple of 64, which Marlin kernels for"),
        (
            "ignored by its config",
            "config.json leaves it unquantized, which method: auto would",
        ),
        ("unknown quant_method", "SGLang has no class for quant_method 'none_such'"),
        ("not Marlin's", r"auto does not run in bfloat16 with AWQConfig \(expected float16\)"),
    ],
)
def test_what_sglang_would_compute_wrongly_or_not_at_all_is_refused(
    results: Results, name: str, message: str
) -> None:
    _, found = results
    assert re.search(message, found[name].get("refused", "")), found[name]
