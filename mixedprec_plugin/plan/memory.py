"""What a rank holds of the weights, against the memory of its GPU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.families.config import Config, count_of, num_kv_ranks, text_config
from mixedprec_plugin.families.names import ExpertShard, parallel_kind
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods.cards import bandwidth_of
from mixedprec_plugin.methods.interface import LayerShape, Target
from mixedprec_plugin.methods.registry import METHODS, USUAL_4_BITS, USUAL_8_BITS
from mixedprec_plugin.plan.budget import KV_BYTES, KV_CACHE, STATES, Load, gpu_budget
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.preset.model import Preset

# compute capability of a GPU with units for every format
_NEWER = 90
# rules of problems: weights that no option makes room for, and others
MEMORY_RULES = _TOO_LARGE, _NO_ROOM = ("memory", "memory-reserve")
_ONE = Load(context=1, concurrency=1)
_MOST = 0.9
# --mamba-full-memory-ratio 0.9: what states of linear attention get of the room beside the weights;
# and how many of them a request takes where prefixes are kept; one more is there for padding
# Source: `_handle_max_mamba_cache` and `_calculate_mamba_ratio`, SGLang 0.5.23's
# mem_cache/kv_cache_configurator.py
_STATES_SHARE = 0.9 / 1.9
_STATES_A_REQUEST = 3
_SPLIT_KINDS = ("linear", "expert", "embedding", "lm_head")


def rank_bytes(layers: Iterable[PlannedLayer], tp_size: int, config: Config) -> int:
    """Return the bytes of weights that each tensor-parallel rank holds."""
    return sum(bytes_by_layer(layers, tp_size, config))


def bytes_by_layer(layers: Iterable[PlannedLayer], tp_size: int, config: Config) -> list[int]:
    """The bytes of each layer that each rank holds.

    Linear layers, experts, embeddings and `lm_head` are split; key and value heads are repeated
    where there are fewer than ranks; all else is on every rank, and a draft model's on none.
    """
    num_parts = parts_of(tp_size, config)
    return [-(-x.bytes_after // num_parts(x)) if x.kind != "draft" else 0 for x in layers]


def parts_of(tp_size: int, config: Config) -> Callable[[PlannedLayer], int]:
    """Return what tells over how many ranks a layer is split."""
    family, kv_ranks = family_of(config), num_kv_ranks(config, tp_size)

    def num_parts(layer: PlannedLayer) -> int:
        is_whole = layer.kind == "linear" and parallel_kind(layer.name, family) == "replicated"
        if layer.kind not in _SPLIT_KINDS or is_whole:
            return 1
        return kv_ranks if layer.shard in ("k", "v") else tp_size

    return num_parts


def usual_load(preset: Preset) -> Load:
    """Requests of 8,192 tokens by SGLang's defaults, the KV cache as a preset says."""
    return Load(8192, 1, KV_BYTES[preset.kv_cache.dtype])


def memory_lines(plan: Plan, load: Load) -> list[str]:
    """What a rank's GPU holds under a load, a line each; empty where its memory is not known."""
    layers, target, config = plan.layers, plan.target, plan.source.config
    gpu = target.gpu
    if gpu is None or not gpu.memory_bytes:
        return []
    held = rank_bytes(layers, target.tp_size, config)
    title = f"{gpu.name} of {_gigabytes(gpu.memory_bytes)}, per rank (--tp {target.tp_size}):"
    try:
        needs = _needs(target, config, load)
    except UsageError as error:
        return [title, f"  {_gigabytes(held):>8}  weights", f"  {error.problems[0].what}"]
    reserve, room = needs.reserve, max(0, gpu.memory_bytes - needs.reserve - held)
    tokens, states = needs.held_in(room)
    num_requests = min(tokens // load.context, load.most_requests or tokens)
    cache = room - states * needs.state
    if needs.state:
        num_requests = min(num_requests, max(0, states - 1) // _STATES_A_REQUEST)
    requests = f", {num_requests} requests of {load.context:,}" if num_requests else ""
    whose = ", by SGLang's default" if load.fraction is None else ""
    fraction = f"{1 - reserve / gpu.memory_bytes:.3g}"
    lines = [
        title,
        f"  {_gigabytes(held):>8}  weights",
        f"  {_gigabytes(reserve):>8}  activations and CUDA graphs{whose} "
        f"(--mem-fraction-static {fraction})",
    ]
    if needs.state:
        lines.append(
            f"  {_gigabytes(room - cache):>8}  {STATES}: {states:,}, {_STATES_A_REQUEST} a request"
        )
    lines.append(f"  {_gigabytes(cache):>8}  KV cache: {tokens:,} tokens{requests}")
    if bandwidth := bandwidth_of(gpu):
        read = bytes_read(layers, target.tp_size, config)
        lines.append(
            f"  at most {bandwidth / read:,.0f} tokens a second for one request, which reads "
            f"{_gigabytes(read)} of weights for each token at {bandwidth // 10**9:,} GB/s"
        )
    return lines + [f"  {text}" for text in _weight_only(layers, target)]


class _Needs(NamedTuple):
    """What a rank keeps beside the weights, in bytes.

    Attributes:
        reserve: neither weights nor what requests keep.
        token: that a token adds to the KV cache.
        state: of linear attention; 0 for a model without.
    """

    reserve: int
    token: int
    state: int

    def held_in(self, room: int) -> tuple[int, int]:
        """Tokens of the KV cache, and states, that SGLang makes of the room beside the weights."""
        states = int(room * _STATES_SHARE / self.state) if self.state else 0
        room -= states * self.state
        return (room // self.token if self.token else 0), states

    @property
    def least(self) -> int:
        """Bytes beside the weights for a request of one token."""
        if not self.state:
            return self.reserve + self.token
        states = self.state * (_STATES_A_REQUEST + 1) / _STATES_SHARE
        return self.reserve + max(round(states), round(self.token / (1 - _STATES_SHARE)))


def _needs(target: Target, config: Config, load: Load) -> _Needs:
    """What a rank keeps beside the weights; a UsageError where that is not known."""
    assert target.gpu is not None
    one = dataclasses.replace(load, context=1, concurrency=1)
    taken = gpu_budget(target.gpu, target.tp_size, config, one).taken
    sizes = {line.title: line.num_bytes for line in taken}
    token, state = sizes.pop(KV_CACHE), sizes.pop(STATES, 0)
    return _Needs(sum(sizes.values()), token, state)


def bytes_read(layers: Iterable[PlannedLayer], tp_size: int, config: Config) -> int:
    """Bytes of weights that a rank reads for one token of one request.

    Of an embedding it is a row, and of experts those that the token is routed to.
    """
    said = text_config(config)
    chosen = count_of(said, "num_experts_per_tok") or count_of(said, "moe_top_k")
    experts: dict[str, set[int]] = {}
    layers = list(layers)
    for layer in layers:
        if isinstance(layer.shard, ExpertShard):
            experts.setdefault(layer.module, set()).add(layer.shard.expert)
    has_head = any(layer.kind == "lm_head" for layer in layers)
    total = 0.0
    for layer, held in zip(layers, bytes_by_layer(layers, tp_size, config), strict=True):
        if isinstance(layer.shard, ExpertShard) and chosen:
            total += held * min(1.0, chosen / len(experts[layer.module]))
        elif layer.kind != "embedding" or not has_head:
            total += held
    return max(1, round(total))


def _weight_only(layers: Iterable[PlannedLayer], target: Target) -> list[str]:
    """Methods whose activations stay in 16 bits on this GPU, and do not on others."""
    assert target.gpu is not None
    found: dict[str, None] = {}
    for layer in layers:
        if layer.kind != "linear" or layer.scheme is None or layer.stored is None:
            continue
        N, K = layer.stored.N, layer.stored.K
        shape = LayerShape(N, K, (N,), "column", target.tp_size, target.dtype)
        kernel, arguments = METHODS[layer.method].kernel, layer.scheme.arguments
        here, there = (kernel(arguments, shape, x) for x in (target.gpu.capability, _NEWER))
        if here == "Marlin" != there:
            found[layer.method] = None
    return [
        f"{name} is weight-only on {target.gpu.name}, which has no units for it: activations stay "
        "in 16 bits"
        for name in found
    ]


def why_not_in_memory(
    layers: Sequence[PlannedLayer], target: Target, config: Config, load: Load = _ONE
) -> list[Problem]:
    """Find whether SGLang would not start on the GPU of a rank: no room beside the weights."""
    if target.gpu is None or not target.gpu.memory_bytes:
        return []
    memory = target.gpu.memory_bytes

    def fits(held: int, tp_size: int) -> bool:
        try:
            least = _needs(dataclasses.replace(target, tp_size=tp_size), config, load).least
        except UsageError:  # what a request keeps is not known; the weights are
            least = 0
        return held + least <= memory

    held = rank_bytes(layers, target.tp_size, config)
    if fits(held, target.tp_size):
        return []
    ways = []
    for method in (USUAL_8_BITS[-1], USUAL_4_BITS):
        size = held + _change(layers, method, target, config)
        if size < held and fits(size, target.tp_size):
            ways.append(f"method: {method} for all linear layers, {_gigabytes(size)} a rank")
            break
    for size in (2, 4, 8, 16, 32):
        if size > target.tp_size and fits(rank_bytes(layers, size, config), size):
            ways.append(f"--tp {size}")
            break
    card = f"{target.gpu.name} of {_gigabytes(memory)}"
    what, rule = f"the weights do not fit: {_gigabytes(held)} a rank on {card}", _TOO_LARGE
    if held <= memory:
        rule = _NO_ROOM
        if held < _MOST * memory and (load.fraction or 0) < _MOST:
            ways.append(f"--mem-fraction-static {_MOST}, which leaves less for activations")
        reserve = _needs(target, config, load).reserve
        what = (
            f"SGLang would not start: {_gigabytes(held)} of weights a rank and "
            f"{_gigabytes(reserve)} for activations and CUDA graphs leave no room for a KV cache "
            f"on {card}"
        )
    remedy = f"use {', or '.join(ways)}" if ways else "use methods of fewer bits"
    return [Problem("--gpu", what, remedy, rule)]


def _change(layers: Iterable[PlannedLayer], method: str, target: Target, config: Config) -> int:
    """By how many bytes a rank's weights change where linear layers and experts run in a method."""
    spec, num_parts = METHODS[method], parts_of(target.tp_size, config)

    @functools.cache
    def size(N: int, K: int) -> int:
        return sum(x.num_bytes for x in spec.stored(spec.defaults, N, K, target.dtype).values())

    return sum(
        min(0, size(layer.stored.N, layer.stored.K) - layer.bytes_after) // num_parts(layer)
        for layer in layers
        if layer.kind in ("linear", "expert") and layer.stored is not None and layer.num_weights
    )


def _gigabytes(num_bytes: int) -> str:
    """Decimal, as GPUs are sold: 80000000000 -> "80 GB"."""
    return f"{num_bytes / 10**9:.1f} GB".replace(".0 GB", " GB")
