"""What is written while a model loads: into which memory, and from which tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack


class WriteRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is written into which memory, and follows stream tensors on their way there.

    SGLang's weight loaders accept tensors that are too short or too long without a word, and its
    models drop tensors that they do not know; only what was really written tells.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: dict[int, int] = {}
        # name of a followed tensor -> the memory that it was written into
        self.arrived: dict[str, set[int]] = {}
        self._names: dict[int, frozenset[str]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # nothing is compiled here, and each call would ask whether it is
        return False

    def follow(self, name: str, tensor: torch.Tensor) -> None:
        """Watch for `tensor`, or what is made of it, being written anywhere."""
        self._names[storage_id(tensor)] = frozenset((name,))

    def forget(self, tensor: torch.Tensor) -> None:
        """Do not take `tensor` for one whose freed memory it may have inherited."""
        self._names.pop(storage_id(tensor), None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_mutable(func):
            if args and isinstance(args[0], torch.Tensor):
                self._count(args)
        elif self._names and isinstance(result, torch.Tensor):
            names = self._followed(args)
            if names:
                self._names[storage_id(result)] = names
            else:
                self.forget(result)
        return result

    def _count(self, args: tuple[Any, ...]) -> None:
        target = storage_id(args[0])
        self.written[target] = self.written.get(target, 0) + args[0].numel()
        for name in self._followed(args[1:]):
            self.arrived.setdefault(name, set()).add(target)

    def _followed(self, args: Sequence[Any]) -> frozenset[str]:
        """The names of the tensors among some arguments, lists of them (torch.cat) included."""
        names: frozenset[str] = frozenset()
        for arg in args:
            if isinstance(arg, torch.Tensor):
                names |= self._names.get(storage_id(arg), frozenset())
            elif isinstance(arg, list | tuple):
                names |= self._followed(arg)
        return names


def storage_id(tensor: torch.Tensor) -> int:
    """Tell tensors apart that are not views of each other, while they live."""
    return int(tensor.untyped_storage()._cdata)


@functools.cache
def _is_mutable(func: Any) -> bool:
    return bool(func._schema.is_mutable)


def is_recording() -> bool:
    """Whether what this thread writes is being counted."""
    modes = _get_current_dispatch_mode_stack()
    return any(isinstance(mode, WriteRecorder) for mode in modes)
