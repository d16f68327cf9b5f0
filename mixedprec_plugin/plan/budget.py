"""What the GPU of a rank holds beside the weights: SGLang's reserve and the KV cache, line by line.

SGLang gives weights and KV cache a fraction of the memory, --mem-fraction-static, and keeps the
rest for activations and CUDA graphs. Source: `handle_gpu_memory_settings`
(arg_groups/memory_hook.py:44) and `DefaultPoolConfigurator._compute_cell_size`
(model_executor/pool_configurator.py:340), SGLang 0.5.23's, below sglang/srt.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.families.config import Config, count_of, sizes, text_config
from mixedprec_plugin.methods.cards import Gpu

KV_CACHE, STATES = "KV cache", "states of linear attention"
# --kv-cache-dtype -> bytes of a number in the KV cache
KV_BYTES = {"auto": 2, "bf16": 2, "bfloat16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}
_MIB = 1 << 20
# memory below so many MiB -> tokens of a chunk of prefill, requests of the largest CUDA graph on
# fewer than four ranks, and on more
_DEFAULTS = (
    (20 << 10, 2048, 8, 8),
    (35 << 10, 4096, 48, 160),
    (60 << 10, 4096, 32, 160),
    (160 << 10, 8192, 256, 512),
)
_LARGEST_DEFAULTS = (16384, 512, 512)
# what a shorter chunk of prefill is counted as
_LEAST_CHUNK = 2048
# tokens of the CUDA graphs of prefill: ranges as (first, behind the last, step)
_PREFILL_GRAPHS = (
    (4, 33, 4), (48, 257, 16), (288, 513, 32), (576, 1025, 64), (1280, 4097, 256),
    (4608, 1 << 62, 512),
)  # fmt: skip
_MOST_TP = 64


@dataclasses.dataclass(frozen=True)
class Load:
    """What a server is to hold at once.

    Attributes:
        context: tokens of one request, prompt and answer.
        concurrency: requests.
        kv_bytes: bytes of a number in the KV cache, 1 for --kv-cache-dtype fp8_e4m3.
        fraction: --mem-fraction-static; None for SGLang's default.
        chunk: tokens that --chunked-prefill-size names; None for SGLang's default.
        most_requests: --max-running-requests; None for as many as fit.
    """

    context: int
    concurrency: int
    kv_bytes: int = 2
    fraction: float | None = None
    chunk: int | None = None
    most_requests: int | None = None


class Line(NamedTuple):
    """One line of the arithmetic: what it is, its bytes on a rank, and where they come from."""

    title: str
    num_bytes: int
    formula: str


@dataclasses.dataclass(frozen=True)
class Budget:
    """What is left of a rank's GPU for weights: its memory but for what else is taken."""

    memory: Line
    taken: tuple[Line, ...]

    @property
    def weights(self) -> int:
        """Bytes that are left for weights on each rank; negative where the rest takes more."""
        return self.memory.num_bytes - sum(line.num_bytes for line in self.taken)

    @property
    def lines(self) -> tuple[Line, ...]:
        """All of it, ending in what is left."""
        return (self.memory, *self.taken, Line("left for weights", self.weights, "the rest"))


def gpu_budget(gpu: Gpu, tp_size: int, config: Config, load: Load) -> Budget:
    """Tell what a rank's GPU has left for weights.

    Raises:
        UsageError: the GPU's memory is not known, or what a request keeps in a kind of layer.
    """
    if not gpu.memory_bytes:
        what = f"the memory of {gpu.name} is not known (expected a name, such as H100)"
        raise UsageError(Problem("--gpu", what, "name the GPU, or give --budget", "gpu"))
    memory = Line("memory", gpu.memory_bytes, f"{gpu.name}, {gpu.memory_bytes // 10**9} GB")
    if load.fraction is None:
        reserve = _default_reserve(gpu.memory_bytes, tp_size, config, load)
    else:
        title = f"left free by --mem-fraction-static {load.fraction:g}"
        free = gpu.memory_bytes - int(gpu.memory_bytes * load.fraction)
        reserve = Line(title, free, "as asked")
    return Budget(memory, (reserve, *_cache(config, tp_size, load)))


def _default_reserve(memory_bytes: int, tp_size: int, config: Config, load: Load) -> Line:
    """What SGLang keeps for activations and CUDA graphs by default, on a server of one node."""
    memory = memory_bytes / _MIB
    defaults = (row[1:] for row in _DEFAULTS if memory < row[0])
    chunk, few, many = next(defaults, _LARGEST_DEFAULTS)
    chunk = load.chunk or chunk
    max_bs = min(few if tp_size < 4 else many, load.most_requests or few + many)
    if count_of(text_config(config), "kv_lora_rank"):
        graphs, told = 1536, "1,536 MiB for graphs of latent attention"
    else:
        sizes = [size for r in _PREFILL_GRAPHS for size in range(r[0], min(r[1], chunk + 1), r[2])]
        graphs, told = 8 * len(sizes), f"8 MiB x {len(sizes)} graphs of prefill"
    tokens = max(chunk, _LEAST_CHUNK)
    reserve = 512 + 1.5 * tokens + 128 * tp_size + 2 * max_bs + graphs
    formula = (
        f"512 MiB + 1.5 MiB x {tokens:,} tokens of prefill + 128 MiB x {tp_size} "
        f"rank{'s' if tp_size > 1 else ''} + 2 MiB x {max_bs} requests of a graph + {told}"
    )
    if memory > 60 << 10 and reserve < 10 << 10:
        reserve, formula = 10 << 10, f"{formula}; at least 10 GiB on such a GPU"
    # the fraction is rounded to three digits
    fraction = round((memory - reserve) / memory, 3)
    title = f"SGLang's reserve (--mem-fraction-static {fraction:g})"
    return Line(title, memory_bytes - int(memory_bytes * fraction), formula)


def _cache(config: Config, tp_size: int, load: Load) -> list[Line]:
    said = sizes(config)
    num_linear = _linear_layers(text_config(config))
    num_layers = count_of(said, "num_hidden_layers") - num_linear
    tokens = load.context * load.concurrency
    if rank := count_of(said, "kv_lora_rank"):
        numbers = rank + count_of(said, "qk_rope_head_dim")
        told = f"({rank} latent + {numbers - rank} rotary)"
    else:
        size = count_of(said, "head_dim")
        kv_heads = max(1, count_of(said, "num_key_value_heads") // tp_size)
        values = count_of(said, "v_head_dim") or size
        numbers, told = kv_heads * (size + values), f"{kv_heads} heads x ({size} + {values})"
    formula = (
        f"{load.concurrency:,} requests x {load.context:,} tokens x {num_layers} layers x {told} x "
        f"{load.kv_bytes} bytes"
    )
    lines = [Line(KV_CACHE, tokens * num_layers * numbers * load.kv_bytes, formula)]
    if num_linear:
        lines.append(_states(text_config(config), num_linear, tp_size, load))
    return lines


def _linear_layers(said: Config) -> int:
    """How many layers keep a state of one size a request, and no keys and values."""
    count, every = (count_of(said, key) for key in ("num_hidden_layers", "full_attention_interval"))
    kinds = said.get("layer_types")
    if not isinstance(kinds, list):
        return count - count // every if every else 0
    unknown = {str(kind) for kind in kinds if not str(kind).endswith("attention")}
    if unknown:
        what = f"what a request keeps in layers of {', '.join(sorted(unknown))} is not known"
        raise UsageError(Problem("--context", what, "give --budget", "gpu"))
    return sum(kind == "linear_attention" for kind in kinds)


def _states(said: Config, num_layers: int, tp_size: int, load: Load) -> Line:
    """The states of gated delta nets, in float32, and the last inputs of their convolutions."""
    keys, values = (count_of(said, f"linear_num_{x}_heads") for x in ("key", "value"))
    key_size, value_size = (count_of(said, f"linear_{x}_head_dim") for x in ("key", "value"))
    last = count_of(said, "linear_conv_kernel_dim") - 1
    if min(keys, values, key_size, value_size, last) <= 0:
        what = "config.json does not say how large the states of its linear attention are"
        raise UsageError(Problem("--context", what, "give --budget", "gpu"))
    channels = 2 * keys * key_size + values * value_size
    size = (values * key_size * value_size * 4 + channels * last * 2) // tp_size
    formula = (
        f"{load.concurrency:,} requests x {num_layers} layers x ({values} heads x {key_size} x "
        f"{value_size} x 4 bytes + {channels:,} channels x {last} x 2 bytes) / {tp_size}"
    )
    return Line(STATES, load.concurrency * num_layers * size, formula)


def nearest_that_fits(
    gpu: Gpu, tp_size: int, config: Config, load: Load, weights: Callable[[int], int]
) -> str:
    """Say what would fit where a load does not: fewer requests, shorter ones, or more ranks.

    Args:
        weights: number of ranks -> bytes of weights on each of them.
    """

    def fits(size: int, **changed: Any) -> bool:
        asked = dataclasses.replace(load, **changed)
        return weights(size) <= gpu_budget(gpu, size, config, asked).weights

    found = []
    if most := _most(load.concurrency, lambda n: fits(tp_size, concurrency=n)):
        found.append(f"--concurrency {most}")
    if most := _most(load.context, lambda n: fits(tp_size, context=n)):
        found.append(f"--context {most}")
    more = (tp_size << n for n in range(1, _MOST_TP.bit_length()))
    if size := next((size for size in more if size <= _MOST_TP and fits(size)), 0):
        found.append(f"--tp {size}")
    return f"it fits with {', or '.join(found)}" if found else "take a larger GPU"


def _most(upto: int, fits: Callable[[int], bool]) -> int:
    """The largest number below one that does not fit; 0 if not even 1 does."""
    return bisect.bisect_left(range(1, upto), True, key=lambda number: not fits(number))
