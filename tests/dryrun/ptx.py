"""Triton kernels, compiled for the card down to machine code, and not launched.

Triton needs no GPU to compile for one: a driver that names the target is enough, and the bundled
ptxas does the rest. What the card's architecture lacks (e4m3 before 8.9) fails here as it would
there, and so does a kernel that asks for more shared memory than the card has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.runtime import autotuner, driver, jit

from tests.dryrun.cards import Card
from tests.dryrun.journal import JOURNAL


class _Driver:
    """The part of Triton's driver that compiling asks for."""

    def __init__(self, card: Card) -> None:
        self._card = card

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._card.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_capability(self, *_args: Any) -> tuple[int, int]:
        return self._card.capability

    def get_device_interface(self) -> Any:
        return torch.cuda


def install(card: Card) -> None:
    """Compile every Triton kernel at its launch, for the whole process."""
    driver.set_active(_Driver(card))
    stock = jit.JITFunction.run

    def run(
        kernel: Any, *args: Any, grid: Any = None, warmup: bool = False, **keywords: Any
    ) -> None:
        JOURNAL.launch("triton", kernel.__name__)
        with _disable_current_modes():
            before = _num_compiled(kernel)
            made = stock(
                kernel,
                *map(_shape_of, args),
                grid=(1,),
                warmup=True,
                **{name: _shape_of(value) for name, value in keywords.items()},
            )
            JOURNAL.compiled[kernel.__name__] += _num_compiled(kernel) - before
            # what the driver refuses at the launch
            assert made.metadata.shared <= card.shared_bytes, (kernel.__name__, made.metadata)

    jit.JITFunction.run = run
    autotuner.Autotuner.run = _refuse_autotuning


def _num_compiled(kernel: Any) -> int:
    return sum(len(caches[0]) for caches in kernel.device_caches.values())


def _shape_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return jit.MockTensor(value.dtype, list(value.shape))
    return value


def _refuse_autotuning(kernel: Any, *_args: Any, **_keywords: Any) -> None:
    raise NotImplementedError(f"an autotuned kernel was reached: {kernel.fn}")
