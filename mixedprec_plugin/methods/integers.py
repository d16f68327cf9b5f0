"""What the formats of integers in groups along K share; see `quantize.integers` for the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from mixedprec_plugin.methods.interface import choice
from mixedprec_plugin.methods.stored import FLOAT_DTYPES, StoredFormat, Tensors, said_keys, unusable

PACKED = ("qweight", "qzeros", "scales")
GROUP_SIZE_SCHEMA = choice(
    "Input features (along K) that share a scale; must divide K, and K per rank "
    "under tensor parallelism. -1 makes each output feature one group. Smaller groups are more "
    "precise and cost more bits a weight.",
    [128, 64, 32, -1],
)
ROUNDING_SCHEMA = choice(
    "Quantizing only: to the nearest code while the model is loaded; or so that the predictions "
    "change least, which `mixedprec convert` does beforehand.",
    ["nearest", "calibrated"],
)
GROUP_SIZES = tuple({"group_size": size} for size in (128, 64, 32, -1))

_NORMAL = NormalDist()
_LIMIT, _LIMIT_OF_COLUMNS, _LIMIT_OF_8_BITS = 0.33, 0.45, 0.05


def group_rank(group_size: int) -> float:
    """Return what a smaller group adds to a method's rank, below 0.1."""
    return 0.0 if group_size == -1 else 1 / group_size


def limit(bits: int, group_size: Any, of_4_bits: float = _LIMIT) -> float:
    """Return the limit of `Rounding`; measured figures are in `verify.thresholds`."""
    if bits == 8:
        return _LIMIT_OF_8_BITS
    return _LIMIT_OF_COLUMNS if group_size == -1 else of_4_bits


def elements(group_size: int, K: int) -> int:
    """Return the input features of a group."""
    return K if group_size == -1 else group_size


def symmetric_error(bits: int, group: int) -> float:
    """Expected relative RMS error of `quantize.integers`' symmetric grid on normal weights.

    A group's step is the range that its largest weights span, over the number of codes; the error
    is uniform within a step, so its RMS is step / sqrt(12). Symmetric codes reach half a step
    beyond half of the range on the side of the largest weight, half a step less on the other.
    """
    half = 1 << (bits - 1)
    other = _NORMAL.inv_cdf((1 - 0.5**0.5) ** (1 / group))
    return max(largest(group) / (half + 0.5), other / (half - 0.5)) / math.sqrt(12)


def asymmetric_error(bits: int, group: int) -> float:
    """The same of the grid with zero points."""
    return 2 * _NORMAL.inv_cdf(0.5 ** (1 / group)) / ((1 << bits) - 1) / math.sqrt(12)


def largest(count: int) -> float:
    """Median of the largest magnitude among standard normal numbers."""
    return _NORMAL.inv_cdf((1 + 0.5 ** (1 / count)) / 2)


def config_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What GPTQ's and auto-round's config.json say under the same keys."""
    return said_keys(config, bits="bits", group_size="group_size", symmetric="sym")


def why_not_integers(
    stored: StoredFormat, arguments: Mapping[str, Any], *, has_words_along_n: bool = True
) -> str | None:
    """Say why integers in groups cannot be those of a method that has the same.

    Args:
        arguments: the method's `bits` and `group_size`.
        has_words_along_n: whether its words, of codes or zero points, run along N.
    Returns:
        empty if they can; None where the layer is stored in something else.
    """
    if stored.numbers != "integers":
        return None
    if not stored.codec:
        return f"this release does not read {stored.description}"
    K, size, bits = stored.K, stored.how["group_size"], stored.how.get("bits", 4)
    if bits != arguments["bits"]:
        return f"it has {bits} bits"
    if elements(size, K) != elements(arguments["group_size"], K):
        return f"it has groups of {size}"
    codes = 32 // math.gcd(32, bits)
    if (has_words_along_n and stored.N % codes) or K % codes:
        return f"[{stored.N}, {K}] does not fill whole words"
    return ""


def why_not_symmetric(stored: StoredFormat, method: str, may_round: bool) -> str:
    """Say why integers cannot be those of a method that is served symmetric only; else empty."""
    symmetric = stored.facts.get("symmetric", stored.said.get("symmetric"))
    if symmetric is None:
        is_told = stored.encoding == method or not may_round
        return "" if is_told else "nothing tells that it is symmetric"
    return "" if symmetric else f"it is asymmetric, and {method} is served symmetric only"


def packed_shapes(tensors: Tensors) -> tuple[tuple[int, ...], ...] | None:
    """The shapes of a "qweight" int32, "qzeros" int32 and "scales"; None where they are no such."""
    found = [tensors[suffix] for suffix in PACKED if suffix in tensors]
    is_packed = [tensor.dtype for tensor in found[:2]] == ["I32", "I32"] and len(found) == 3
    if not is_packed or found[2].dtype not in FLOAT_DTYPES:
        return None
    shapes = tuple(tensor.shape for tensor in found)
    return shapes if all(len(shape) == 2 for shape in shapes) else None


def ragged(
    tensors: Tensors, label: str, N: int, K: int, groups: int, encoding: str
) -> StoredFormat:
    """Name a layer whose groups do not divide K."""
    text = f"{label} with {groups} groups that do not divide K = {K}"
    return unusable(tensors, text, N, K, encoding=encoding)
