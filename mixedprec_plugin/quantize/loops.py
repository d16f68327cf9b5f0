"""How loops over the rows of a weight are compiled, and run in several threads."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch


def compiled(function: Any) -> Any:
    """Compile when first called; kept beside the code or in the user's cache, for later processes.

    Without fastmath: every operation is rounded as IEEE 754 says, as torch's are.
    """
    compile_it = functools.partial(numba.njit, nogil=True, error_model="numpy", boundscheck=False)
    try:
        return compile_it(cache=True)(function)
    except RuntimeError:
        # neither folder can be written
        return compile_it()(function)


def inlined(function: Any) -> Any:
    """Compile as a part of each loop that calls it."""
    return numba.njit(inline="always")(function)


def over_rows(kernel: Any, num_rows: int, *arguments: Any, multiple: int = 1) -> None:
    """Run a loop over all output features, some of them in each of torch's threads.

    Args:
        kernel: called with the arguments, and the first row and the one behind the last.
        multiple: a thread's first row is a multiple of it.
    """
    num_threads, pieces = torch.get_num_threads(), -(-num_rows // multiple)
    size = -(-pieces // num_threads) * multiple

    def run(first: int) -> None:
        kernel(*arguments, first, min(first + size, num_rows))

    if size >= num_rows:
        run(0)
    else:
        # an error of a thread is raised here
        list(_threads(num_threads).map(run, range(0, num_rows, size)))


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "loops")
