"""Every method in every linear layer kind on a real GPU: classes, refusals, numbers."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch

from mixedprec_plugin.errors import MixedPrecisionError
from tests.dryrun.cards import CARDS, Card
from tests.dryrun.expected import expect
from tests.dryrun.methods import METHODS, TP_SIZES, Method
from tests.gpu.exact import Off, compare, inputs, quantized_input, tolerance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    # what SGLang and the compilers of its kernels warn of on a GPU is not ours
    pytest.mark.filterwarnings("ignore"),
]
if torch.cuda.is_available():
    # DeepGEMM would compile for every batch size up to 16,384 before its first matmul; read when
    # SGLang is imported
    os.environ.setdefault("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")
KINDS = (
    "column", "narrow", "ragged", "merged", "qkv", "few_kv_heads", "row", "replicated", "lm_head",
)  # fmt: skip
NUM_TOKENS = (1, 7, 33, 256)
# DeepGEMM compiles a kernel for each N, K and tile of tokens
_FEW_TOKENS = (7, 256)
# words of the names of the CUDA kernels that a page's kernel launches
_LAUNCHED = {
    "aten:mm": "gemm|nvjet|cutlass|cublas|gemv",
    "jit:per_token_quant_fp8": "per_token_quant_fp8",
    "jit:per_token_group_quant": "per_token_group_quant|QuantTrait|quant_kernel",
    "sgl_kernel:fp8_scaled_mm": "cutlass|scaled_mm",
    "deep_gemm:fp8_fp4_gemm_nt": "deep_gemm|fp8_gemm|sm90_fp8",
    "triton:_static_quant_fp8": "_static_quant_fp8",
    "triton:_per_token_group_quant_int8": "_per_token_group_quant_int8",
    "triton:_w8a8_block_int8_matmul": "_w8a8_block_int8_matmul",
    "jit:gptq_marlin_gemm": "[Mm]arlin",
    "humming:humming_gemm": "humming",
}


def card_of(capability: int) -> Card:
    """The card of the dry run with this compute capability."""
    cards = [card for card in CARDS.values() if card.architecture == capability]
    if not cards:
        pytest.skip(f"the dry run plays no card of compute capability {capability / 10}")
    return cards[0]


def exact_output(loaded: Any, method: str, kind: str, tp_size: int, x: torch.Tensor) -> Any:
    """The last rank's outputs in float64, [T, N]."""
    from tests.gpu.layers import KINDS as LAYERS

    given = LAYERS[kind]
    scales = [
        own.tensors["input_scale"] for own in loaded.stored.values() if method == "fp8_static"
    ]
    left = quantized_input(method, x.cpu(), max(map(float, scales), default=0.0))
    parts = []
    for name in given.weights:
        own = loaded.stored[name]
        num_rows = own.weight.shape[0] // given.num_ranks(name, tp_size)
        part = left @ own.weight[-num_rows:, -x.shape[1] :].t()
        if "bias" in own.tensors:
            part = part + own.tensors["bias"][-num_rows:].double()
        parts.append(part)
    return torch.cat(parts, 1)


def differences(method: str, kind: str, tp_size: int, device: str) -> tuple[str, dict[int, Off]]:
    """Class of the layer's method; number of tokens -> how far off they are."""
    from tests.gpu import layers

    found = {}
    made = layers.plan_linear(method, kind, tp_size, device)
    with layers.linear(made, kind, tp_size, device) as loaded:
        width = layers.KINDS[kind].inputs(tp_size, torch.bfloat16).shape[1]
        runs_as = layers.class_of(loaded.layer)
        is_marlin = "MarlinLinearScheme" in runs_as
        for num_tokens in _FEW_TOKENS if method == "fp8_block" else NUM_TOKENS:
            x = inputs(num_tokens, width).to(device)
            before = x.clone()
            out = layers.run_linear(loaded.layer, x)
            assert torch.equal(x, before), "the layer wrote over its inputs"
            exact = exact_output(loaded, method, kind, tp_size, x)
            assert (tuple(out.shape), out.dtype) == (tuple(exact.shape), torch.bfloat16)
            allowed = tolerance(
                method, num_tokens, out.shape[1], width,
                has_bias=layers.KINDS[kind].num_kv_heads > 0, is_marlin=is_marlin,
            )  # fmt: skip
            found[num_tokens] = compare(out, exact, allowed)
    return runs_as, found


def as_text(found: dict[int, Off]) -> str:
    """`1: 0.00123 (worst 0.00234, limit 0.00456); ...`."""
    return "; ".join(f"{key}: {off}" for key, off in found.items())


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.title)
def test_class_is_the_pages_and_outputs_are_the_dequantized_matmuls(
    gpu: int, report: list[str], method: Method, kind: str, tp_size: int
) -> None:
    from tests.gpu import layers

    expected = expect(card_of(gpu), method, kind, tp_size, "bfloat16")
    if expected.refused:
        with pytest.raises(MixedPrecisionError, match=re.escape(expected.refused)):
            layers.plan_linear(method.title, kind, tp_size).check()
        return
    runs_as, found = differences(method.title, kind, tp_size, "cuda")
    text = as_text(found)
    report.append(f"linear {method.title}, {kind}, tp {tp_size}: {runs_as}, off by {text}")
    assert all(off.is_within for off in found.values()), text
    assert runs_as == expected.runs_as


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.title)
def test_kernels_are_the_pages(gpu: int, report: list[str], method: Method) -> None:
    from tests.gpu import layers

    expected = expect(card_of(gpu), method, "column", 1, "bfloat16")
    made = layers.plan_linear(method.title, "column", 1)
    with layers.linear(made, "column", 1) as loaded:
        x = inputs(256, 1024).to("cuda")
        layers.run_linear(loaded.layer, x)
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            layers.run_linear(loaded.layer, x)
            torch.cuda.synchronize()
    events = [event for event in profile.events() if "CUDA" in str(event.device_type)]
    names = list(dict.fromkeys(event.name for event in events))
    if not names:
        pytest.skip("the profiler saw no kernels: CUPTI may not be open here")
    report.append(f"kernels of {method.title}: {'; '.join(name[:90] for name in names)}")
    missing = [
        kernel
        for kernel in expected.kernels
        if kernel in _LAUNCHED and not any(re.search(_LAUNCHED[kernel], name) for name in names)
    ]
    assert not missing, f"{missing} not among {names}"
