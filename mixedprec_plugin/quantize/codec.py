"""What a codec does: a module between a weight, its numbers and the tensors that store them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, cast

import torch

Tensors: TypeAlias = Mapping[str, torch.Tensor]


class Numbers(Protocol):
    """The codes and scales of a weight, in whatever packing: `Integers` or `Scaled`."""

    def dequantize(self) -> torch.Tensor:
        """Return the weight, float32 [N, K]."""


class Codec(Protocol):
    """A module of these functions. Formats that are only read have `read` alone.

    None changes the tensors that it is given, and each takes a few MiB beside its result.
    """

    def quantize(
        self, weight: torch.Tensor, arguments: Mapping[str, Any], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Quantize a weight [N, K]; `dtype` is what the model runs in.

        Raises:
            ShapeError, MethodError: it cannot be, with the reason.
        """

    def read(self, tensors: Tensors, arguments: Mapping[str, Any]) -> Numbers:
        """Tell the numbers of stored tensors (by parameter suffix).

        Raises:
            ShapeError: a tensor is missing, or of another shape or dtype.
        """

    def write(
        self, numbers: Numbers, arguments: Mapping[str, Any], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Store the same numbers as this method does; nothing is rounded.

        Raises:
            NotTheSameNumbersError: it cannot hold them.
        """

    def take_stored(
        self, tensors: Tensors, arguments: Mapping[str, Any], *, checks: bool
    ) -> dict[str, torch.Tensor]:
        """Return stored tensors as they are served, with those that follow from the rest; optional.

        Args:
            checks: whether SGLang's kernels take for granted what only values tell.
        Raises:
            NotTheSameNumbersError: they would compute other numbers.
        """


class NotTheSameNumbersError(ValueError):
    """The values are none that the other format holds.

    Attributes:
        remedy: what to do instead of dequantizing the layer; may be empty.
        can_round: whether rounding a second time would serve it.
    """

    def __init__(self, what: str, remedy: str = "", *, can_round: bool = False) -> None:
        super().__init__(what)
        self.remedy = remedy
        self.can_round = can_round


@functools.cache
def load_codec(lazy: str) -> Codec:
    """Import a codec.

    Args:
        lazy: name of the module.
    """
    return cast(Codec, importlib.import_module(lazy))
