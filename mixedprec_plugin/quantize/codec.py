"""What a codec does: a module between a weight, its numbers and the tensors that store them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, cast

import torch

from mixedprec_plugin.quantize.rounding import Grid, Tiles

Tensors: TypeAlias = Mapping[str, torch.Tensor]
TensorDict: TypeAlias = dict[str, torch.Tensor]
Arguments: TypeAlias = Mapping[str, Any]


class Numbers(Protocol):
    """The codes and scales of a weight, in whatever packing: `Integers` or `Scaled`."""

    def dequantize(self) -> torch.Tensor:
        """Return the weight, float32 [N, K]."""


class Codec(Protocol):
    """A module of these functions. Formats that are only read have `read` alone.

    None changes the tensors that it is given, and each takes a few MiB beside its result.
    """

    def quantize(
        self, weight: torch.Tensor, arguments: Arguments, dtype: torch.dtype
    ) -> TensorDict:
        """Quantize a weight, rounding to nearest.

        Args:
            weight: [N, K], floating point, any device.
            arguments: the method's, as `registry.bind` returns them.
            dtype: the running model's.
        Returns:
            the tensors of `Method.stored`, contiguous, on the weight's device.
        Raises:
            ShapeError: no matrix of floats, not finite, or of a shape that the method cannot hold.
            MethodError: the arguments ask for what a weight alone cannot give.
        """

    def read(self, tensors: Tensors, arguments: Arguments) -> Numbers:
        """Tell the numbers of stored tensors (by parameter suffix).

        Args:
            arguments: `StoredFormat.how`, or the method's.
        Raises:
            ShapeError: a tensor is missing, or of another shape or dtype.
        """

    def write(self, numbers: Numbers, arguments: Arguments, dtype: torch.dtype) -> TensorDict:
        """Store the same numbers as this method does; nothing is rounded.

        Raises:
            NotTheSameNumbersError: it cannot hold them.
        """

    def grid(self, arguments: Arguments, dtype: torch.dtype) -> Grid | Tiles:
        """What codes stand for: integers in groups, or codes with a scale a tile; optional.

        Layers of a method that has it can be calibrated: `write` stores what is rounded on it.
        """

    def round_inputs(
        self, inputs: torch.Tensor, tensors: Tensors, arguments: Arguments
    ) -> torch.Tensor:
        """What the method's kernels make of a layer's inputs; optional: weight-only methods do not.

        Args:
            inputs: float32 [T, K].
            tensors: the layer's, for scales that are stored.
        Returns:
            float32 [T, K].
        """

    def take_stored(self, tensors: Tensors, arguments: Arguments, *, checks: bool) -> TensorDict:
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
    """Import a codec by the name of its module."""
    return cast(Codec, importlib.import_module(lazy))
