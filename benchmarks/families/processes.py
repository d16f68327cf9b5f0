"""Forked children of a process that has imported SGLang once."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

_POLL_SECONDS = 0.02
# what the other rank gets to fail by itself, when one has
_GRACE_SECONDS = 5.0


class ChildError(Exception):
    """A child failed; its text is what it said."""


def forked(
    works: Sequence[Callable[[], Any]],
    folder: Path,
    *,
    timeout_seconds: float = 300,
    is_quiet: bool = True,
) -> list[Any]:
    """Run each of some functions in a child of its own, all at once.

    A child has what this process has imported, and nothing of what another child did.

    Args:
        folder: for what they return, which torch must be able to save; and, where quiet, for what
            they print.
    Returns:
        what they returned, in order.
    Raises:
        ChildError: one raised, died, or took too long; the others are ended.
    """
    paths = [folder / f"child-{index}.pt" for index in range(len(works))]
    sys.stdout.flush()
    pids = [_fork(work, path, is_quiet) for work, path in zip(works, paths, strict=True)]
    _wait(pids, timeout_seconds)
    results = []
    for path in paths:
        status, value = (
            torch.load(path, weights_only=False)
            if path.exists()
            else ("failed", "it died or took too long")
        )
        path.unlink(missing_ok=True)
        results.append((status, value))
    failures = [value for status, value in results if status != "done"]
    if failures:
        raise ChildError(failures[0])
    return [value for _, value in results]


def _fork(work: Callable[[], Any], path: Path, is_quiet: bool) -> int:
    path.unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    # what SGLang and transformers say on the way is of use only where a child fails
    if is_quiet:
        log = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
    code = 1
    # whatever ends a child, it must not go on as its parent
    try:
        result = ("done", work())
        code = 0
    except BaseException as error:  # noqa: BLE001
        text = "".join(traceback.format_exception(error)).rstrip()
        result = ("failed", text)
    torch.save(result, path)
    os._exit(code)


def _wait(pids: Sequence[int], timeout_seconds: float) -> None:
    left = set(pids)
    deadline = time.monotonic() + timeout_seconds
    while left:
        for pid in sorted(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.discard(pid)
                if status:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if left and time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return
        time.sleep(_POLL_SECONDS)
