"""`python -m tests.calibrate.two_ranks VERB ...`: as torchrun has two ranks, but imported once.

They are forks of a process in which nothing has run: autograd's threads do not survive a fork.
"""

from __future__ import annotations

import os
import sys

import torch

from mixedprec_plugin.cli.main import main
from mixedprec_plugin.evaluate.server import free_port


def run_two(words: list[str]) -> None:
    """Run the command as each of two ranks, and end as the worse of them does."""
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(2):
        ranks.append(os.fork())
        if not ranks[-1]:
            torch.set_num_threads(1)
            os.environ.update(where, RANK=str(rank))
            sys.exit(main(words))
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks))


if __name__ == "__main__":
    run_two(sys.argv[1:])
