"""A process that forks one conversion for each line it reads: the imports are paid for once.

python -m tests.convert.forker
<- {"argv": […], "stop_at": n}     n: number of the change to the file system to die at; null
-> {"pid": …}                      of the child that converts
-> {"status": …, "seconds": …}     how it ended, as waitpid says it
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time

import torch

import mixedprec_plugin.convert.converter  # noqa: F401  imported before the fork
from mixedprec_plugin.cli.main import main

_CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"})


def die_at_change(number: int) -> None:
    """Kill this process with SIGKILL just before its n-th change to the file system."""
    left = number

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        is_write = event == "open" and bool(int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))  # type: ignore[call-overload]
        if event in _CHANGES or is_write:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def serve() -> None:
    """Answer requests until standard input ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            if request["stop_at"]:
                die_at_change(request["stop_at"])
            os._exit(main(request["argv"], io.StringIO(), sys.stderr))
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": status, "seconds": time.monotonic() - start}), flush=True)


if __name__ == "__main__":
    serve()
