"""Tensors that are made when they are read, and of them only the part that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

# of each dimension, the indices that are wanted
Box = tuple[range, ...]
Make = Callable[[Box], torch.Tensor]

_aten = torch.ops.aten


class LazyTensor(torch.Tensor):
    """Stands for a tensor on the CPU that is not there yet.

    SGLang's weight loaders are given whole tensors; a tensor-parallel rank narrows and transposes
    them, and copies what is left. These views are noted here. Whatever else is done makes the part
    that is in view, and does it to that.

    Attributes:
        make: indices of each dimension -> that part, contiguous or not.
        box: the indices in view, of each dimension that `make` knows.
        order: those dimensions in the order of this tensor's own.
    """

    make: Make
    box: Box
    order: tuple[int, ...]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, make: Make, dtype: torch.dtype, box: Box, order: tuple[int, ...] | None = None
    ) -> LazyTensor:
        order = tuple(range(len(box))) if order is None else order
        shape = [len(box[dim]) for dim in order]
        made: LazyTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=torch.device("cpu")
        )
        made.make, made.box, made.order = make, box, order
        return made

    def read(self) -> torch.Tensor:
        """Make the part in view."""
        with _disable_current_modes(), torch.device("cpu"):
            return self.make(self.box).permute(self.order)

    def then(
        self, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
    ) -> LazyTensor:
        """The same with every element changed when it is made."""
        make = self.make
        return LazyTensor(lambda box: change(make(box)), dtype, self.box, self.order)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        view = _VIEWS.get(func)
        if view is not None and not kwargs:
            return view(*args)
        made = _made if func is _aten.copy_.default else _made_as_told
        args, kwargs = tree_map(made, (args, kwargs or {}))
        return func(*args, **kwargs)


def _made(value: Any) -> Any:
    return value.read() if isinstance(value, LazyTensor) else value


def _made_as_told(value: Any) -> Any:
    """The same in the order in memory that a lazy tensor says it has: `contiguous` asks no more."""
    return value.read().contiguous() if isinstance(value, LazyTensor) else value


def _sliced(
    tensor: LazyTensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> torch.Tensor:
    box, axis = list(tensor.box), tensor.order[dim]
    # as torch does, a range counts from the end, and stops there
    box[axis] = box[axis][start:end:step]
    return LazyTensor(tensor.make, tensor.dtype, tuple(box), tensor.order)


def _transposed(tensor: LazyTensor, first: int = 0, second: int = 1) -> torch.Tensor:
    order = list(tensor.order)
    order[first], order[second] = order[second], order[first]
    return LazyTensor(tensor.make, tensor.dtype, tensor.box, tuple(order))


def _same(tensor: LazyTensor) -> torch.Tensor:
    return LazyTensor(tensor.make, tensor.dtype, tensor.box, tensor.order)


_VIEWS: dict[Any, Callable[..., torch.Tensor]] = {
    _aten.slice.Tensor: _sliced,
    _aten.transpose.int: _transposed,
    _aten.t.default: _transposed,
    _aten.detach.default: _same,
    _aten.alias.default: _same,
}
