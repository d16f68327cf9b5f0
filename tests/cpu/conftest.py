"""SGLang's linear layers in this process: one rank, no process group."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def linear_module() -> SimpleNamespace:
    """The module of SGLang's linear layers, its context published for a single rank."""
    with warnings.catch_warnings():
        # SGLang warns at import that AWQ and GGUF need a GPU.
        warnings.simplefilter("ignore")
        from sglang.srt.layers import linear
        from sglang.srt.runtime_context import get_context, get_parallel

        import mixedprec_plugin.cpu.configs  # noqa: F401
    get_context().override_server_args(tp_size=1).install()
    group = SimpleNamespace(rank_in_group=0, world_size=1, cpu_group=None, device_group=None)
    get_parallel().override_permanently(
        tp_rank=0, attn_tp_rank=0, tp_group=group, attn_tp_group=group
    )
    return linear
