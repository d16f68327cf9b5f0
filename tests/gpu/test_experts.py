"""Layers of experts on a real GPU: each method alone, several in one layer, in CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixedprec_plugin.errors import MixedPrecisionError
from tests.dryrun.experts import HIDDEN, KINDS, MODULE, NUM_EXPERTS, RULES, TOP_K
from tests.dryrun.methods import TP_SIZES
from tests.dryrun.test_experts import RUNS_AS
from tests.gpu.exact import Off, compare, inputs
from tests.gpu.exact_experts import evaluate, expert_weights, last_ranks, tolerance
from tests.gpu.test_layers import as_text, card_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    # what SGLang and the compilers of its kernels warn of on a GPU is not ours
    pytest.mark.filterwarnings("ignore"),
]
NUM_TOKENS = (1, 7, 64, 300)
_COMPOSITES = ("several", "several, with FP8")


def route(num_tokens: int, device: str, seed: int = 0) -> Any:
    """Random choices in SGLang's form."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    generator = torch.Generator().manual_seed(1000 * seed + num_tokens)

    logits = torch.randn(num_tokens, NUM_EXPERTS, generator=generator, dtype=torch.float32)
    weights, ids = logits.softmax(1).topk(TOP_K)
    return StandardTopKOutput(weights.to(device), ids.int().to(device), logits.to(device))


def methods_of(loaded: Any) -> list[str]:
    """The canonical methods of a loaded layer's experts."""
    return sorted({own.method for own in loaded.stored.values()})


def exact_output(loaded: Any, tp_size: int, x: torch.Tensor, topk: Any) -> torch.Tensor:
    """The last rank's part of the layer's output, float64."""
    weights = last_ranks(expert_weights(loaded.stored, MODULE, NUM_EXPERTS), tp_size)
    found: torch.Tensor = evaluate(x.cpu(), topk.topk_weights.cpu(), topk.topk_ids.cpu(), weights)
    return found


def differences(
    method: str, kind: str, tp_size: int, device: str
) -> tuple[list[str], dict[int, Off]]:
    """Classes of the methods; number of tokens -> how far off they are."""
    from tests.dryrun.experts import class_names
    from tests.gpu import layers

    found = {}
    made = layers.plan_experts(method, kind, tp_size, device)
    with layers.expert_layer(made, kind, tp_size, device) as loaded:
        limit = tolerance(methods_of(loaded), HIDDEN, KINDS[kind] // tp_size)
        runs_as = class_names(loaded.layer) if device == "cuda" else []
        for num_tokens in NUM_TOKENS:
            x, topk = inputs(num_tokens, HIDDEN).to(device), route(num_tokens, device)
            out = loaded.layer(x.clone(), topk)
            assert (tuple(out.shape), out.dtype) == (tuple(x.shape), torch.bfloat16)
            found[num_tokens] = compare(out, exact_output(loaded, tp_size, x, topk), limit)
    return runs_as, found


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", RULES)
def test_class_is_the_pages_and_outputs_are_the_loop_over_experts(
    gpu: int, report: list[str], method: str, kind: str, tp_size: int
) -> None:
    from tests.dryrun.test_experts import _runs
    from tests.gpu import layers

    cell = {"method": method, "kind": kind, "tp_size": tp_size}
    if not _runs(card_of(gpu).title, cell):
        with pytest.raises(
            MixedPrecisionError, match=r"capability|is not a multiple of|not divide"
        ):
            layers.plan_experts(method, kind, tp_size).check()
        return
    runs_as, found = differences(method, kind, tp_size, "cuda")
    text = as_text(found)
    report.append(f"experts {method}, {kind}, tp {tp_size}: off by {text}")
    assert all(off.is_within for off in found.values()), text
    assert runs_as == RUNS_AS[method]


@pytest.mark.parametrize("num_tokens", NUM_TOKENS[:3])
@pytest.mark.parametrize("method", _COMPOSITES)
def test_captured_layer_of_several_methods_is_the_eager_one(
    gpu: int, report: list[str], method: str, num_tokens: int
) -> None:
    from tests.gpu import layers

    made = layers.plan_experts(method, "experts", 1)
    with layers.expert_layer(made, "experts", 1) as loaded:
        static_x = inputs(num_tokens, HIDDEN).cuda()
        static = route(num_tokens, "cuda")
        graph, captured = _capture(loaded.layer, static_x, static)
        found = {}
        for seed in (1, 2):
            x = inputs(num_tokens + seed, HIDDEN)[:num_tokens].cuda()
            topk = route(num_tokens, "cuda", seed)
            assert not torch.equal(topk.topk_weights, static.topk_weights)
            eager = loaded.layer(x.clone(), topk).clone()
            static_x.copy_(x)
            for target, source in zip(static, topk, strict=True):
                target.copy_(source)
            graph.replay()
            torch.cuda.synchronize()
            # Marlin may add up parts of K in another order
            limit = tolerance(["awq"], HIDDEN, KINDS["experts"])
            found[seed] = compare(captured, eager.cpu().double(), limit)
            exact = exact_output(loaded, 1, x, topk)
            limit = tolerance(methods_of(loaded), HIDDEN, KINDS["experts"])
            found[10 + seed] = compare(captured, exact, limit)
    text = as_text(found)
    report.append(
        f"graph of {method}, {num_tokens} tokens: from the eager runs 1, 2 and the exact 11, 12 "
        f"off by {text}"
    )
    assert all(off.is_within for off in found.values()), text


def _capture(layer: Any, x: torch.Tensor, topk: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Record the layer as SGLang records a step of decoding: after runs that compile."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            layer(x, topk)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x, topk)
    return graph, out
