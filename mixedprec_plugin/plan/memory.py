"""What a rank holds of the weights, against the memory of its GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.config import Config, num_kv_ranks
from mixedprec_plugin.families.names import parallel_kind
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import PlannedLayer

_SPLIT_KINDS = ("linear", "expert", "embedding", "lm_head")


def rank_bytes(layers: Iterable[PlannedLayer], tp_size: int, config: Config) -> int:
    """Return the bytes of weights that each tensor-parallel rank holds.

    Linear layers, experts, embeddings and `lm_head` are split; key and value heads are repeated
    where there are fewer than ranks; all else is on every rank, and layers for a draft model on
    none.
    """
    return sum(bytes_by_layer(layers, tp_size, config))


def bytes_by_layer(layers: Iterable[PlannedLayer], tp_size: int, config: Config) -> list[int]:
    """The bytes of each layer that each rank holds."""
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


def memory_line(layers: Iterable[PlannedLayer], target: Target, config: Config) -> str:
    """One line: what a rank's weights take of its GPU; empty where that is not known."""
    if target.gpu is None or not target.gpu.memory_bytes:
        return ""
    held, memory = rank_bytes(layers, target.tp_size, config), target.gpu.memory_bytes
    return (
        f"{target.gpu.name} of {_gigabytes(memory)}: {_gigabytes(held)} of weights a rank at "
        f"tensor parallel {target.tp_size}, {held / memory:.0%} of its memory"
    )


def why_not_in_memory(
    layers: Sequence[PlannedLayer], target: Target, config: Config
) -> list[Problem]:
    """Find whether the weights alone are more than the GPU of a rank holds."""
    if target.gpu is None or not target.gpu.memory_bytes:
        return []
    held, memory = rank_bytes(layers, target.tp_size, config), target.gpu.memory_bytes
    if held <= memory:
        return []
    remedy = "use methods of fewer bits"
    for size in (2, 4, 8, 16, 32):
        if size > target.tp_size and rank_bytes(layers, size, config) <= memory:
            remedy += f", or --tp {size}"
            break
    what = (
        f"the weights do not fit: {_gigabytes(held)} a rank on {target.gpu.name} of "
        f"{_gigabytes(memory)}"
    )
    return [Problem("--gpu", what, remedy, "memory")]


def _gigabytes(num_bytes: int) -> str:
    """Decimal, as GPUs are sold: 80000000000 -> "80 GB"."""
    return f"{num_bytes / 10**9:.1f} GB".replace(".0 GB", " GB")
