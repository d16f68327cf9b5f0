"""Time of a layer of experts in several groups over one in a single group, on the CPU platform.

    python -m benchmarks.composite_experts [--threads 1] [--out FILE]

Every group has the same method, so that nothing but the composite differs: its tables, a loop for
each group, and the sum of the groups. One group is the method by itself, as a homogeneous layer
runs it. Routing is random and alike for all. Ratios come from one run, each from the least of
several times, taken in turn; times are the process's CPU time, which other processes lengthen less.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mixedprec_plugin.methods.construct import build_config
from mixedprec_plugin.methods.registry import METHODS, bind

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 768, 768, 32, 4
NUM_GROUPS = (1, 2, 4, 8)
TOKENS = (1, 8, 64)
SCHEMES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bf16", {}),
    ("fp8_block", {}),
    ("blockwise_int8", {}),
    ("awq", {"group_size": 128}),
    ("gptq", {"bits": 8, "group_size": 128}),
)
REPEATS = 25


class _Choice:
    """A config that gives the layer its groups' method."""

    def __init__(self, groups: Sequence[Any]) -> None:
        self._groups = groups

    def get_name(self) -> str:
        return "mixedprec"

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        from mixedprec_plugin.cpu.unquantized_experts import UnquantizedFusedMoEMethod
        from mixedprec_plugin.experts.method import experts_method

        # SGLang's own CPU path is another loop; compared with it, not the composite is measured
        return experts_method(layer, prefix, self._groups) or UnquantizedFusedMoEMethod()


def make_layer(name: str, given: dict[str, Any], num_groups: int) -> Any:
    """A layer of experts in so many groups of one method, filled with random weights."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    from mixedprec_plugin.experts.groups import ExpertGroup
    from mixedprec_plugin.experts.loading import load_expert_tensor

    method, arguments = bind(name, given)
    spec = METHODS[method]
    groups = [
        ExpertGroup(
            tuple(range(first, NUM_EXPERTS, num_groups)),
            build_config(method, arguments, "cpu") if spec.quantizer else None,
        )
        for first in range(num_groups)
    ]
    layer: Any = FusedMoE(
        NUM_EXPERTS, HIDDEN, INTERMEDIATE, layer_id=0, top_k=TOP_K, params_dtype=torch.bfloat16,
        inplace=False, prefix="experts", quant_config=_Choice(groups),
    )  # fmt: skip
    for shard in ("w1", "w2", "w3"):
        shape = (HIDDEN, INTERMEDIATE) if shard == "w2" else (INTERMEDIATE, HIDDEN)
        weight = torch.randn(shape).mul_(0.03).bfloat16()
        tensors = {"weight": weight}
        if spec.quantizer:
            module, function = spec.quantizer.split(":")
            tensors = getattr(import_module(module), function)(weight, arguments, torch.bfloat16)
        for expert in range(NUM_EXPERTS):
            for suffix, tensor in tensors.items():
                load_expert_tensor(layer, expert, shard, suffix, tensor)
    for module in layer.modules():
        if hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)
    return layer


def measure(layers: Sequence[Any], num_tokens: int) -> list[float]:
    """Least milliseconds of each layer, taken in turn."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    x = torch.randn(num_tokens, HIDDEN).bfloat16()
    logits = torch.randn(num_tokens, NUM_EXPERTS)
    weights, ids = logits.softmax(1).topk(TOP_K)
    best = [float("inf")] * len(layers)
    for _ in range(REPEATS):
        for index, layer in enumerate(layers):
            start = time.process_time()
            layer(x, StandardTopKOutput(weights, ids.int(), logits))
            best[index] = min(best[index], time.process_time() - start)
    return [seconds * 1e3 for seconds in best]


def table() -> str:
    """One line for each method and number of tokens."""
    heads = " | ".join(f"{count} groups" for count in NUM_GROUPS[1:])
    lines = [
        f"| method | tokens | 1 group, ms | {heads} |",
        "|---|---|---|" + "---|" * len(NUM_GROUPS[1:]),
    ]
    for name, given in SCHEMES:
        layers = [make_layer(name, given, count) for count in NUM_GROUPS]
        for num_tokens in TOKENS:
            base, *others = measure(layers, num_tokens)
            ratios = " | ".join(f"{value / base:.2f}" for value in others)
            lines.append(f"| {name} | {num_tokens} | {base:.2f} | {ratios} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Print the table, or write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="write the table to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    # SGLang warns at import that AWQ and GGUF need a GPU.
    warnings.simplefilter("ignore")
    from sglang.srt.runtime_context import get_context, get_parallel

    get_context().override_server_args(tp_size=1).install()
    group = SimpleNamespace(rank_in_group=0, world_size=1)
    get_parallel().override_permanently(
        tp_rank=0, moe_tp_rank=0, moe_ep_rank=0, tp_group=group, moe_tp_group=group,
        moe_ep_group=group,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.inference_mode():
        text = table()
    text = _PAGE.format(
        capability=torch.backends.cpu.get_cpu_capability(), threads=options.threads, table=text
    )
    if options.out:
        Path(options.out).write_text(text, encoding="utf-8")
    else:
        print(text, end="")


_PAGE = f"""# What experts in several groups cost

Written by `make composite-speed`: time of a layer whose experts run in several groups, as those of
several schemes do, over one in a single group. All groups have the same method, so that nothing but
the composite differs. On the CPU platform ({{capability}}, threads: {{threads}}): {NUM_EXPERTS}
experts of {HIDDEN} x {INTERMEDIATE}, {TOP_K} of them a token; the least of {REPEATS} CPU times.

{{table}}

Each group adds a call of SGLang's experts, with a table that maps ids, and a sum. On a GPU that is
some launches more for each group; no GPU was at hand to time them.
"""


if __name__ == "__main__":
    main(sys.argv[1:])
