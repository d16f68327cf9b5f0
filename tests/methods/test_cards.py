from __future__ import annotations

import re
from typing import Any

import pytest

from mixedprec_plugin.errors import UsageError
from mixedprec_plugin.methods.cards import find_gpu, served_dtype
from mixedprec_plugin.methods.interface import LayerShape
from tests.dryrun.cards import CARDS
from tests.methods.shapes import check


def linear(N: int = 1024, K: int = 1024, **changes: Any) -> LayerShape:
    return LayerShape(N=N, K=K, shard_sizes=(N,), parallel="column", **changes)


def reasons(name: str, capability: int, shape: LayerShape, **arguments: Any) -> list[str]:
    found = check(name, arguments, shape, capability=capability)
    return [f"{text}; {remedy}" for text, remedy in found]


@pytest.mark.parametrize(
    ("text", "name", "capability", "gigabytes"),
    [
        ("H100", "H100", 90, 80),
        ("h100", "H100", 90, 80),
        ("4090", "RTX 4090", 89, 24),
        ("rtx4090", "RTX 4090", 89, 24),
        ("RTX-2080-Ti", "RTX 2080 Ti", 75, 11),
        ("L40S", "L40S", 89, 48),
        ("A100 40GB", "A100", 80, 40),
        # names as drivers report them
        ("NVIDIA A100-SXM4-80GB", "A100", 80, 80),
        ("NVIDIA H100 80GB HBM3", "H100", 90, 80),
        ("NVIDIA H100 PCIe", "H100", 90, 80),
        ("NVIDIA GeForce RTX 3090", "RTX 3090", 86, 24),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 89, 48),
        ("Quadro RTX 6000", "RTX 6000", 75, 24),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000", 120, 96),
        ("Tesla T4", "T4", 75, 16),
        ("NVIDIA B200", "B200", 100, 180),
    ],
)
def test_gpu_is_found(text: str, name: str, capability: int, gigabytes: int) -> None:
    gpu = find_gpu(text)
    assert (gpu.name, gpu.capability, gpu.memory_bytes) == (name, capability, gigabytes * 10**9)


@pytest.mark.parametrize("text", ["9.0", "sm_90", "sm90", "SM90a"])
def test_capability_stands_for_a_gpu(text: str) -> None:
    gpu = find_gpu(text)
    assert (gpu.name, gpu.capability, gpu.memory_bytes) == ("compute capability 9.0", 90, 0)


@pytest.mark.parametrize("title", CARDS)
def test_cards_of_the_dry_run_are_found_by_both_names(title: str) -> None:
    card = CARDS[title]
    for text in (card.title, card.name):
        gpu = find_gpu(text)
        assert gpu.capability == card.architecture
        assert gpu.memory_bytes <= card.memory_bytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("H1000", "--gpu: 'H1000' is not known .*; did you mean H100[?]$"),
        ("4090 Ti", "'4090 Ti' is not known .*; did you mean RTX 4090[?]$"),
        ("potato", "'potato' is not known .expected V100, .*, or as 8.9.*; give its compute"),
        ("MI300X", "'MI300X' is no NVIDIA GPU .expected one, or --device cpu"),
        ("RX 7900 XTX", "'RX 7900 XTX' is no NVIDIA GPU"),
        ("M3 Max", "'M3 Max' is no NVIDIA GPU"),
        ("V100", "SGLang does not run on V100 .expected compute capability 7.5"),
        ("6.1", "SGLang does not run on compute capability 6.1"),
        ("RTX 4090 48GB", "RTX 4090 has no 48 GB .expected 24 GB"),
        ("", "is not known"),
    ],
)
def test_unknown_gpu_raises(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_gpu(text)


def test_bfloat16_becomes_float16_before_ampere() -> None:
    assert [served_dtype("BF16", capability) for capability in (75, 80, 90)] == [
        "F16", "BF16", "BF16",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "capability", "message"),
    [
        (
            "fp8_channel",
            80,
            r"fp8_channel does not run .* 8.0 .expected 8.9 or more.; use method: fp8 or gptq or i",
        ),
        ("fp8", 75, r"fp8 does not .* 7.5 .expected 8.0 or more.; use method: awq or unquantized"),
        ("gptq", 75, r"gptq does not run on this GPU.*; use method: awq or unquantized"),
        ("awq", 75, r"awq does not run in bfloat16 on this GPU.*; start with --dtype float16"),
    ],
)
def test_old_card_refuses(method: str, capability: int, message: str) -> None:
    dtype = "BF16" if method == "awq" else "F16"
    found = reasons(method, capability, linear(dtype=dtype))

    assert re.search(message, found[0])


def test_column_as_one_group_needs_marlin() -> None:
    found = reasons("awq", 75, linear(dtype="F16"), group_size=-1)
    assert found == [
        "awq with group_size -1 runs in Marlin kernels, and the GPU's compute capability is 7.5 "
        "(expected 8.0 or more); use group_size: 128"
    ]
    assert not reasons("awq", 80, linear(), group_size=-1)


def test_fp8_without_fp8_units_needs_marlins_tiles() -> None:
    narrow = linear(N=256, tp_size=8)
    assert reasons("fp8", 86, narrow) == [
        "its share of a rank is [32, 1024], and FP8 runs in Marlin kernels on this GPU "
        "(expected multiples of [64, 128] or [128, 64]); use method: int8_channel or unquantized"
    ]
    assert not reasons("fp8", 89, narrow)
    assert not reasons("fp8", 80, linear())


def test_remedy_names_only_what_runs() -> None:
    # 1056 is no multiple of 64, so Marlin takes it no more as GPTQ; a lone layer may end in a
    # partial block
    (found,) = reasons("fp8", 80, linear(N=1056))
    assert found.endswith("; use method: int8_channel or blockwise_int8 or awq or unquantized")


@pytest.mark.parametrize(
    ("method", "capability", "message"),
    [
        ("fp8_channel", 80, "fp8_channel does not .* more.; use method: gptq or int8_channel or b"),
        ("fp8", 80, "fp8 for experts runs in a Triton kernel .* is 8.0 .expected 8.9 or more"),
        ("awq", 75, "awq for experts runs in Marlin kernels"),
    ],
)
def test_experts_need_more(method: str, capability: int, message: str) -> None:
    found = reasons(method, capability, linear(dtype="F16", is_expert=True))
    assert re.search(message, found[0])


def test_newer_cards_refuse_nothing() -> None:
    for name in ("fp8", "fp8_block", "fp8_channel", "int8", "awq", "gptq", "unquantized"):
        for capability in (89, 90, 100, 103, 120, 121):
            assert not reasons(name, capability, linear())
