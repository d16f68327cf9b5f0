"""torch.cuda, answering as a card would."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch

from tests.dryrun.cards import Card

_NUM_CARDS = 8


class Idle:
    """A stream or event on which nothing happens."""

    cuda_stream = stream_id = device_index = 0
    device_type = 1

    def __init__(self, *_args: Any, **_keywords: Any) -> None:
        self.device = torch.device("cuda", 0)

    def query(self) -> bool:
        """Everything is done at once."""
        return True

    def nothing(self, *_args: Any, **_keywords: Any) -> None:
        """Wait for nothing, record nothing."""

    synchronize = wait_stream = wait_event = record_event = record = wait = nothing


def play(card: Card) -> None:
    """Make torch.cuda answer as if eight of the card were there, for the whole process."""
    properties = _properties(card)
    memory = (card.memory_bytes, card.memory_bytes)
    answers = {
        "is_available": True,
        "device_count": _NUM_CARDS,
        "current_device": 0,
        "get_device_capability": card.capability,
        "get_device_properties": properties,
        "get_device_name": card.name,
        "set_device": None,
        "set_stream": None,
        "synchronize": None,
        "empty_cache": None,
        "is_current_stream_capturing": False,
        "mem_get_info": memory,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _answering(answer))
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = torch.Stream = torch.Event = Idle  # type: ignore[misc, assignment]
    cuda.current_stream = cuda.default_stream = Idle
    cuda.stream = lambda _stream=None: contextlib.nullcontext()


def _answering(answer: Any) -> Any:
    return lambda *_args, **_keywords: answer


def _properties(card: Card) -> SimpleNamespace:
    return SimpleNamespace(
        name=card.name,
        major=card.capability[0],
        minor=card.capability[1],
        total_memory=card.memory_bytes,
        multi_processor_count=card.num_multiprocessors,
        shared_memory_per_block_optin=card.shared_bytes,
        shared_memory_per_multiprocessor=card.shared_bytes_multiprocessor,
        max_threads_per_multi_processor=card.num_threads_multiprocessor,
        regs_per_multiprocessor=65536,
        L2_cache_size=50 << 20,
        warp_size=32,
        is_integrated=0,
        is_multi_gpu_board=0,
        gcnArchName="",
        uuid="played",
    )
