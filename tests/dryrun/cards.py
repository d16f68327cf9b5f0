"""The cards that are played, by what SGLang asks of them."""

from __future__ import annotations

import dataclasses

_GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU as CUDA's device properties describe it.

    Source: NVIDIA's CUDA C++ Programming Guide, "Compute Capabilities", and the products' data
    sheets.

    Attributes:
        title: its short name in the matrix.
        name: as the driver reports it.
        capability: compute capability.
        num_multiprocessors: streaming multiprocessors.
        memory_bytes: device memory.
        shared_bytes: shared memory that a block may opt in to.
        shared_bytes_multiprocessor: shared memory of a multiprocessor.
        num_threads_multiprocessor: threads that a multiprocessor holds.
    """

    title: str
    name: str
    capability: tuple[int, int]
    num_multiprocessors: int
    memory_bytes: int
    shared_bytes: int
    shared_bytes_multiprocessor: int
    num_threads_multiprocessor: int

    @property
    def architecture(self) -> int:
        """90 for compute capability 9.0."""
        return self.capability[0] * 10 + self.capability[1]

    @property
    def dtype(self) -> str:
        """The dtype that SGLang serves a bf16 checkpoint in: float16 where there is no bf16.

        Source: sglang/srt/model_executor/model_runner.py, "compute capability below sm80".
        """
        return "bfloat16" if self.capability >= (8, 0) else "float16"


_ALL = (
    Card("RTX 2080 Ti", "NVIDIA GeForce RTX 2080 Ti", (7, 5), 68, 11 * _GIB, 65536, 65536, 1024),
    Card("A100", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 80 * _GIB, 166912, 167936, 2048),
    Card("RTX 3090", "NVIDIA GeForce RTX 3090", (8, 6), 82, 24 * _GIB, 101376, 102400, 1536),
    Card("RTX 4090", "NVIDIA GeForce RTX 4090", (8, 9), 128, 24 * _GIB, 101376, 102400, 1536),
    Card("H100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 80 * _GIB, 232448, 233472, 2048),
    Card("B200", "NVIDIA B200", (10, 0), 148, 180 * _GIB, 232448, 233472, 2048),
    Card("RTX 5090", "NVIDIA GeForce RTX 5090", (12, 0), 170, 32 * _GIB, 101376, 102400, 1536),
)
CARDS = {card.title: card for card in _ALL}
