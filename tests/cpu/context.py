"""SGLang's context of a process that runs one rank, without a process group."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def publish() -> None:
    """Import SGLang's layers and publish the context that they read."""
    with warnings.catch_warnings():
        # SGLang warns at import that AWQ and GGUF need a GPU.
        warnings.simplefilter("ignore")
        import sglang.srt.layers.quantization  # noqa: F401
        from sglang.srt.runtime_context import get_context, get_parallel
    get_context().override_server_args(tp_size=1).install()
    group = SimpleNamespace(rank_in_group=0, world_size=1, cpu_group=None, device_group=None)
    get_parallel().override_permanently(
        tp_rank=0, attn_tp_rank=0, moe_tp_rank=0, moe_ep_rank=0, tp_group=group,
        attn_tp_group=group, moe_tp_group=group, moe_ep_group=group,
    )  # fmt: skip


def one_of_two_ranks(rank: int) -> contextlib.AbstractContextManager[object]:
    """Play one of two tensor-parallel ranks while layers are built."""
    from sglang.srt.runtime_context import get_parallel

    group = SimpleNamespace(rank_in_group=rank, world_size=2)
    sizes = dict.fromkeys(("tp_size", "attn_tp_size", "moe_tp_size"), 2)
    ranks = dict.fromkeys(("tp_rank", "attn_tp_rank", "moe_tp_rank"), rank)
    groups = dict.fromkeys(("tp_group", "attn_tp_group", "moe_tp_group"), group)
    context: contextlib.AbstractContextManager[object] = get_parallel().override(
        **sizes, **ranks, **groups
    )
    return context


def one_of_two_owners(rank: int) -> contextlib.AbstractContextManager[object]:
    """Play one of two ranks that share experts, each whole, while layers are built and run."""
    from sglang.srt.runtime_context import get_parallel

    group = SimpleNamespace(rank_in_group=rank, world_size=2)
    alone = SimpleNamespace(rank_in_group=0, world_size=1)
    context: contextlib.AbstractContextManager[object] = get_parallel().override(
        tp_size=2, attn_tp_size=2, moe_ep_size=2, moe_tp_size=1,
        tp_rank=rank, attn_tp_rank=rank, moe_ep_rank=rank, moe_tp_rank=0,
        tp_group=group, attn_tp_group=group, moe_ep_group=group, moe_tp_group=alone,
    )  # fmt: skip
    return context


def interpret(module: str, folder: Path) -> dict[str, Any]:
    """What a module writes that runs kernels in Triton's interpreter, in a process of its own."""
    import torch

    path = folder / "results.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, str(path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(path)
    return found
