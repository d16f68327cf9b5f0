"""Time of a layer of experts in several groups over one in a single group.

    python -m benchmarks.composite_experts [--device cuda] [--threads 1] [--out FILE]

Every group has the same method, so that nothing but the composite differs: its tables, a loop for
each group, and the sum of the groups. One group is the method by itself, as a homogeneous layer
runs it. Routing is random and alike for all. Ratios come from one run, each from the least of
several times, taken in turn; on the CPU platform they are the process's CPU time, which other
processes lengthen less, on a GPU those of replays of a CUDA graph.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.figures import Figure, keep
from mixedprec_plugin.methods.construct import build_config
from mixedprec_plugin.methods.registry import METHODS, bind
from mixedprec_plugin.quantize.codec import load_codec

NUM_GROUPS = (1, 2, 4, 8)
SCHEMES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bf16", {}),
    ("fp8_block", {}),
    ("blockwise_int8", {}),
    ("awq", {"group_size": 128}),
    ("gptq", {"bits": 8, "group_size": 128}),
)
REPEATS = 25


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a layer of experts.

    Attributes:
        hidden, intermediate: features.
        top_k: experts of a token.
        tokens: how many are routed at once, in turn.
    """

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    tokens: tuple[int, ...]


# the second is Qwen3-30B-A3B's
SIZES = {"cpu": Size(768, 768, 32, 4, (1, 8, 64)), "cuda": Size(2048, 768, 128, 8, (1, 8, 64, 512))}


class _Choice:
    """A config that gives the layer its groups' method."""

    def __init__(self, groups: Sequence[Any], device: str) -> None:
        self._groups = groups
        self._device = device

    def get_name(self) -> str:
        return "mixedprec"

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        from mixedprec_plugin.experts.composite import experts_method

        method = experts_method(layer, prefix, self._groups)
        if method is not None or self._device == "cuda":
            return method
        from mixedprec_plugin.methods.bf16.sglang import UnquantizedFusedMoEMethod

        # SGLang's own CPU path is another loop; compared with it, not the composite is measured
        return UnquantizedFusedMoEMethod()


def make_layer(name: str, given: dict[str, Any], num_groups: int, device: str) -> Any:
    """A layer of experts in so many groups of one method, filled with random weights."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    from mixedprec_plugin.experts.groups import ExpertGroup
    from mixedprec_plugin.experts.loading import load_expert_tensor

    method, arguments = bind(name, given)
    spec = METHODS[method]
    size = SIZES[device]
    groups = [
        ExpertGroup(
            tuple(range(first, size.num_experts, num_groups)),
            method,
            method,
            build_config(method, arguments, device) if spec.codec else None,
        )
        for first in range(num_groups)
    ]
    with torch.device(device):
        layer: Any = FusedMoE(
            size.num_experts, size.hidden, size.intermediate, layer_id=0, top_k=size.top_k,
            params_dtype=torch.bfloat16, inplace=False, prefix="experts",
            quant_config=_Choice(groups, device),
        )  # fmt: skip
    for shard in ("w1", "w2", "w3"):
        wide = (size.intermediate, size.hidden)
        shape = wide[::-1] if shard == "w2" else wide
        weight = torch.randn(shape).mul_(0.03).bfloat16()
        tensors = {"weight": weight}
        if spec.codec:
            tensors = load_codec(spec.codec).quantize(weight, arguments, torch.bfloat16)
        for expert in range(size.num_experts):
            for suffix, tensor in tensors.items():
                load_expert_tensor(layer, expert, shard, suffix, tensor)
    for module in layer.modules():
        if hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)
    return layer


def measure(layers: Sequence[Any], num_tokens: int, device: str) -> list[float]:
    """Least milliseconds of each layer, taken in turn."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    size = SIZES[device]
    x = torch.randn(num_tokens, size.hidden).bfloat16().to(device)
    logits = torch.randn(num_tokens, size.num_experts).to(device)
    weights, ids = logits.softmax(1).topk(size.top_k)
    routed = StandardTopKOutput(weights, ids.int(), logits)
    clocks = [(_captured if device == "cuda" else _eager)(layer, x, routed) for layer in layers]
    rounds = [[clock() for clock in clocks] for _ in range(REPEATS)]
    return [min(times) for times in zip(*rounds, strict=True)]


def _eager(layer: Any, x: torch.Tensor, routed: Any) -> Callable[[], float]:
    def clock() -> float:
        start = time.process_time()
        layer(x, routed)
        return (time.process_time() - start) * 1e3

    return clock


def _captured(layer: Any, x: torch.Tensor, routed: Any) -> Callable[[], float]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            layer(x.clone(), routed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x, routed)

    def clock() -> float:
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        graph.replay()
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 10

    return clock


def table(device: str) -> tuple[str, list[Figure]]:
    """One line for each method and number of tokens; and each layer's time as a figure."""
    figures = []
    heads = " | ".join(f"{count} groups" for count in NUM_GROUPS[1:])
    lines = [
        f"| method | tokens | 1 group, ms | {heads} |",
        "|---|---|---|" + "---|" * len(NUM_GROUPS[1:]),
    ]
    for name, given in SCHEMES:
        layers = [make_layer(name, given, count, device) for count in NUM_GROUPS]
        for num_tokens in SIZES[device].tokens:
            base, *others = measure(layers, num_tokens, device)
            ratios = " | ".join(f"{value / base:.2f}" for value in others)
            lines.append(f"| {name} | {num_tokens} | {base:.3f} | {ratios} |")
            figures += [
                Figure(f"{name}, {num_tokens} tokens, {count} groups, ms", value, base)
                for count, value in zip(NUM_GROUPS[1:], others, strict=True)
            ]
    return "\n".join(lines), figures


def main(arguments: Sequence[str]) -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="write the page to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    # SGLang warns at import that AWQ and GGUF need a GPU.
    warnings.simplefilter("ignore")
    from sglang.srt.model_executor.cuda_graph_config import default_cuda_graph_config
    from sglang.srt.runtime_context import get_context, get_parallel

    graphs = default_cuda_graph_config()
    get_context().override_server_args(tp_size=1, cuda_graph_config=graphs).install()
    group = SimpleNamespace(rank_in_group=0, world_size=1)
    get_parallel().override_permanently(
        tp_rank=0, moe_tp_rank=0, moe_ep_rank=0, moe_dp_rank=0, tp_group=group,
        moe_tp_group=group, moe_ep_group=group,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.inference_mode():
        text, figures = table(options.device)
    keep(f"composite experts, {options.device}", figures)
    if options.out:
        page = _page(text, options.device, options.threads)
        Path(options.out).write_text(page, encoding="utf-8")


def _page(text: str, device: str, threads: int) -> str:
    size = SIZES[device]
    where = (
        f"On a GPU ({torch.cuda.get_device_name()})"
        if device == "cuda"
        else f"On the CPU platform ({torch.backends.cpu.get_cpu_capability()}, threads: {threads})"
    )
    least = "replays of a CUDA graph" if device == "cuda" else "CPU times"
    return f"""# What experts in several groups cost

Written by `make composite-speed`: time of a layer whose experts run in several groups, as those of
several schemes do, over one in a single group. All groups have the same method, so that nothing but
the composite differs. {where}: {size.num_experts}
experts of {size.hidden} x {size.intermediate}, {size.top_k} of them a token; the least of
{REPEATS} {least}.

{text}

Each group adds a call of SGLang's experts, with a table that maps ids, and a sum. On a GPU that is
some launches more for each group.
"""


if __name__ == "__main__":
    main(sys.argv[1:])
