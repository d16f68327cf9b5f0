"""SGLang's context of one tensor-parallel rank; no process group, no processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.runtime_context import get_context, get_parallel

from tests.dryrun.journal import JOURNAL


class _Group:
    """A group of ranks that says what was exchanged and exchanges nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = self.rank_in_group = rank
        self.world_size = size
        self.cpu_group = self.device_group = None
        self.is_first_rank = self.is_last_rank = True
        self.device = torch.device("cuda", 0)

    def all_reduce(self, tensor: torch.Tensor, *_args: Any, **_keywords: Any) -> torch.Tensor:
        """The tensor as it is."""
        JOURNAL.launch("ranks", "all_reduce")
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1, **_keywords: Any) -> torch.Tensor:
        """The tensor as often as there are ranks."""
        JOURNAL.launch("ranks", "all_gather")
        return torch.cat([tensor] * self.world_size, dim)


class OneStage:
    """A pipeline of one stage, which runs every layer."""

    def runs(self, _layer: Any) -> bool:
        """Always."""
        return True


@contextlib.contextmanager
def rank(tp_size: int) -> Iterator[None]:
    """Publish SGLang's context of the last of `tp_size` ranks."""
    from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
    from sglang.srt.model_executor.cuda_graph_config import default_cuda_graph_config

    last = tp_size - 1
    alone, group = _Group(0, 1), _Group(last, tp_size)
    graphs = default_cuda_graph_config()
    override = get_context().override_server_args(tp_size=tp_size, cuda_graph_config=graphs)
    override.install()
    # as the scheduler does
    initialize_fp4_gemm_config()
    parallel = get_parallel()
    parallel.override_permanently(
        tp_rank=last,
        attn_tp_rank=last,
        moe_tp_rank=last,
        moe_ep_rank=0,
        pp_rank=0,
        attn_dp_rank=0,
        attn_cp_rank=0,
        moe_dp_rank=0,
        attn_dcp_rank=0,
        tp_group=group,
        attn_tp_group=group,
        moe_tp_group=group,
        moe_ep_group=alone,
        pp_group=alone,
    )
    try:
        yield
    finally:
        parallel.clear_stamp()
        override.restore()
