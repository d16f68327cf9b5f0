"""Splits the cores that this process may use among tensor-parallel ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def split_cores(cores: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Give every rank its own run of cores.

    Returns:
        `num_ranks` lists; sizes differ by one at most. With more ranks than cores, ranks share.
    """
    if num_ranks > len(cores):
        return [[cores[rank % len(cores)]] for rank in range(num_ranks)]
    bounds = [rank * len(cores) // num_ranks for rank in range(num_ranks + 1)]
    return [list(cores[start:end]) for start, end in itertools.pairwise(bounds)]


def format_binding(split: Sequence[Sequence[int]]) -> str:
    """The split as SGLang's `SGLANG_CPU_OMP_THREADS_BIND` spells it: `0,1|2,3`."""
    return "|".join(",".join(str(core) for core in cores) for cores in split)
