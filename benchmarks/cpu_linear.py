"""Speed of the CPU platform's linear layers beside torch's bf16 linear.

    python -m benchmarks.cpu_linear [--threads 1] [--tokens 1,8,16,64,256] [--shapes 768x768,...]

The layers are SGLang's, filled by the package's quantizers, by default in the shapes of the demo
model. Milliseconds, of the processor where there is one thread, for so many tokens; the peer is
torch's bf16 linear. `bits` counts everything the layer keeps in memory, scales included. With
`ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2` torch behaves much as on a CPU without AVX-512.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.figures import Figure, keep
from mixedprec_plugin.methods.construct import build_config
from mixedprec_plugin.methods.registry import METHODS, bind
from mixedprec_plugin.quantize.codec import load_codec

# (N, K): the demo model's fused qkv is wider than o_proj; gate_up and down are its MLP.
SHAPES = "768x768,1536x768,768x1536"
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
# more tokens in a forward are prefill
DECODE_TOKENS = 32


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
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = float("inf")
    for index in range(REPEATS + 2):
        start = clock()
        function()
        if index >= 2:
            best = min(best, clock() - start)
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


def limit_for(num_bits: int, num_tokens: int, base: float) -> float | None:
    """What 4 bits may take: as long as bf16, half as long in decode from 8 requests on."""
    if num_bits != 4:
        return None
    return base / 2 if 8 <= num_tokens <= DECODE_TOKENS else base


def measure(shapes: Sequence[tuple[int, int]], token_counts: Sequence[int]) -> list[Figure]:
    """The layers' times and bits, by shape and method."""
    figures = []
    for N, K in shapes:
        inputs = {count: torch.randn(count, K).bfloat16() for count in token_counts}
        weight = torch.randn(N, K).bfloat16()
        linear = partial(torch.nn.functional.linear, weight=weight)
        base = {count: milliseconds(partial(linear, x)) for count, x in inputs.items()}
        for name, given in SCHEMES:
            layer = make_layer(name, given, N, K)
            label = " ".join([f"{N}x{K} {name}", *(f"{key}={given[key]}" for key in given)])
            figures.append(Figure(f"{label}, bits", bits_per_weight(layer, N * K), 16.0))
            num_bits = 4 if name == "awq" else given.get("bits", 8)
            for count, x in inputs.items():
                ours = milliseconds(partial(layer, x))
                limit = limit_for(num_bits, count, base[count])
                figures.append(Figure(f"{label}, {count} tokens, ms", ours, base[count], limit))
    return figures


def main(arguments: Sequence[str]) -> None:
    """Measure every shape and method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", default="1,8,16,64,256", help="token counts, comma-separated")
    parser.add_argument("--shapes", default=SHAPES, help="NxK, comma-separated")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    # SGLang warns at import that AWQ and GGUF need a GPU.
    warnings.simplefilter("ignore")
    from sglang.srt.runtime_context import get_context

    get_context().override_server_args(tp_size=1).install()
    with torch.inference_mode():
        shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
        counts = [int(count) for count in options.tokens.split(",")]
        keep("cpu-linear", measure([(N, K) for N, K in shapes], counts))
    print(f"{torch.backends.cpu.get_cpu_capability()}, {options.threads} threads")


if __name__ == "__main__":
    main(sys.argv[1:])
