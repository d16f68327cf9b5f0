"""Speed of the CPU platform's linear layers beside torch's bf16 linear.

    python -m benchmarks.cpu_linear [--threads 1] [--tokens 1,16,64,256] [--json]

The layers are SGLang's, filled by the package's quantizers, in the shapes of the demo model. Every
column is milliseconds for so many tokens and, in brackets, how many times as long as bf16 that is.
`bits` counts everything the layer keeps in memory, scales included. With
`ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2` torch behaves much as on a CPU without AVX-512.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from mixedprec_plugin.methods.construct import build_config
from mixedprec_plugin.methods.registry import METHODS, bind
from mixedprec_plugin.quantize.codec import load_codec

# (N, K): the demo model's fused qkv is wider than o_proj; gate_up and down are its MLP.
SHAPES = ((768, 768), (1536, 768), (768, 1536))
SCHEMES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fp8", {}),
    ("fp8_block", {}),
    ("blockwise_int8", {}),
    ("awq", {"group_size": 128}),
    ("awq", {"group_size": 32}),
    ("gptq", {"bits": 4, "group_size": 128}),
    ("gptq", {"bits": 8, "group_size": 128}),
    ("gptq", {"bits": 8, "group_size": -1}),
)
REPEATS = 15


def make_layer(name: str, given: dict[str, Any], N: int, K: int) -> Any:
    """A linear layer of SGLang in one method, filled with a random weight."""
    from sglang.srt.layers.linear import ReplicatedLinear

    method, arguments = bind(name, given)
    spec = METHODS[method]
    config = build_config(method, arguments, "cpu")
    layer: Any = ReplicatedLinear(
        K, N, bias=False, params_dtype=torch.bfloat16, quant_config=config
    )
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    stored = load_codec(spec.codec).quantize(weight, arguments, torch.bfloat16)
    for suffix, tensor in stored.items():
        parameter = getattr(layer, suffix)
        parameter.weight_loader(parameter, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def milliseconds(function: Callable[[], object]) -> float:
    """The least of some runs, after two that warm up."""
    best = float("inf")
    for index in range(REPEATS + 2):
        start = time.perf_counter()
        function()
        if index >= 2:
            best = min(best, time.perf_counter() - start)
    return best * 1e3


def bits_per_weight(layer: torch.nn.Module, num_weights: int) -> float:
    """Bits of all tensors that the layer keeps, in its parameters, its scheme and its weight."""
    scheme = getattr(layer, "scheme", None)
    owners = [layer, scheme, getattr(scheme, "_weight", None)]
    members = [member for owner in owners if owner is not None for member in vars(owner).values()]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*members, *layer.parameters()]
        if isinstance(tensor, torch.Tensor)
    }
    return sum(storages.values()) * 8 / num_weights


def measure(token_counts: Sequence[int]) -> list[dict[str, Any]]:
    """One record for every shape and method, bf16 first."""
    records = []
    for N, K in SHAPES:
        inputs = {count: torch.randn(count, K).bfloat16() for count in token_counts}
        weight = torch.randn(N, K).bfloat16()
        linear = partial(torch.nn.functional.linear, weight=weight)
        base = {count: milliseconds(partial(linear, x)) for count, x in inputs.items()}
        records.append({"shape": [N, K], "method": "bf16", "bits": 16.0, "ms": base})
        for name, given in SCHEMES:
            layer = make_layer(name, given, N, K)
            times = {count: milliseconds(partial(layer, x)) for count, x in inputs.items()}
            label = " ".join([name, *(f"{key}={value}" for key, value in given.items())])
            bits = round(bits_per_weight(layer, N * K), 2)
            records.append({"shape": [N, K], "method": label, "bits": bits, "ms": times})
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as lines of text."""
    lines = []
    for record in records:
        times = record["ms"]
        if record["method"] == "bf16":
            base = times
            heads = "".join(f"{f'{count} tokens':>16}" for count in times)
            lines += ["", f"{'x'.join(map(str, record['shape'])):<32}{'bits':>6}{heads}"]
        cells = "".join(
            f"{f'{value:.2f} ({value / base[count]:.1f})':>16}" for count, value in times.items()
        )
        lines.append(f"{record['method']:<32}{record['bits']:>6.2f}{cells}")
    return "\n".join(lines[1:])


def main(arguments: Sequence[str]) -> None:
    """Print the table or, with --json, the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", default="1,16,64,256", help="token counts, comma-separated")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    # SGLang warns at import that AWQ and GGUF need a GPU.
    warnings.simplefilter("ignore")
    from sglang.srt.runtime_context import get_context

    get_context().override_server_args(tp_size=1).install()
    with torch.inference_mode():
        records = measure([int(count) for count in options.tokens.split(",")])
    capability = torch.backends.cpu.get_cpu_capability()
    if options.json:
        print(json.dumps({"capability": capability, "layers": records}, indent=2))
    else:
        print(f"{capability}, {options.threads} threads; milliseconds (times bf16)\n")
        print(table(records))


if __name__ == "__main__":
    main(sys.argv[1:])
