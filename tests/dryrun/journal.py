"""What a dry run reached."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mixedprec_plugin.errors import MixedPrecisionError


@dataclasses.dataclass
class Journal:
    """Everything that the recorders saw since the last `clear`.

    Attributes:
        kernels: the kernels in the order of their launches, as `kind:name`.
        made_up: operations whose result depends on data that a dry run has not got.
        written: storage -> which of its elements were copied into, and the storage itself, so that
            no other takes its address.
        misfits: storage -> copies that changed dtype or shape on the way, in words.
        compiled: Triton kernel -> how many specializations of it were compiled.
    """

    kernels: list[str] = dataclasses.field(default_factory=list)
    made_up: list[str] = dataclasses.field(default_factory=list)
    written: dict[int, tuple[np.ndarray, Any]] = dataclasses.field(default_factory=dict)
    misfits: dict[int, list[str]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )
    compiled: dict[str, int] = dataclasses.field(default_factory=lambda: collections.Counter())

    def launch(self, kind: str, name: str) -> None:
        """Note a kernel."""
        self.kernels.append(f"{kind}:{name}")

    def write(self, target: Any, source: Any) -> None:
        """Note a copy into `target`; the loaders accept what does not fit without a word."""
        memory = target.untyped_storage()
        storage = memory._cdata
        size = memory.nbytes() // target.element_size()
        elements, _ = self.written.setdefault(storage, (np.zeros(size, dtype=bool), memory))
        assert elements.size == size, "two dtypes in one storage"
        view = np.lib.stride_tricks.as_strided(
            elements[target.storage_offset() :], tuple(target.shape), tuple(target.stride())
        )
        view[...] = True
        if target.dtype != source.dtype or _core(target.shape) != _core(source.shape):
            self.misfits[storage].append(
                f"{source.dtype} {list(source.shape)} into {target.dtype} {list(target.shape)}"
            )

    def take_kernels(self) -> list[str]:
        """The kernels since the last time, each once, in the order of their first launch."""
        kernels = list(dict.fromkeys(self.kernels))
        self.kernels.clear()
        return kernels

    def clear(self) -> None:
        """Forget all but what was compiled."""
        self.kernels.clear()
        self.made_up.clear()
        self.written.clear()
        self.misfits.clear()


def _core(shape: Any) -> tuple[int, ...]:
    """A shape without its ones: a scale may be stored as [] and held as [1]."""
    return tuple(size for size in shape if size != 1)


JOURNAL = Journal()


@contextlib.contextmanager
def outcome(note: Callable[[str, str], None]) -> Iterator[None]:
    """Run something with an empty journal, and note what it is `refused` with or `broken` by."""
    import torch

    JOURNAL.clear()
    try:
        yield
    except MixedPrecisionError as error:
        note("refused", str(error))
    # whatever SGLang, torch or Triton raise is the result, and fails the test
    except Exception:  # noqa: BLE001
        note("broken", traceback.format_exc())
    finally:
        torch.set_default_dtype(torch.float32)
