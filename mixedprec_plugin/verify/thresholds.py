"""How far from its reference a layer may be, by what it is stored and served as.

The distance is the relative RMS error, |W - R| / |R| over a whole layer. Rounding alone gives

    16 bits      2**-9 for a weight at most, twice where it went through both float16 and bfloat16
    FP8 e4m3     2**-4 for a weight at most (three bits of mantissa); 0.026 measured
    INT8         a step is 2 * top / 255, its rounding error step / sqrt(12), that is 0.0023 times
                 top / RMS, which is 4 to 20 for a block of a real layer; 0.0085 to 0.016 measured
    INT4         0.0385 times top / RMS, which is about 3 for a group; 0.09 to 0.12 measured rounded
                 to nearest, up to 0.20 with GPTQ and 0.28 with its act order, which trade this
                 distance for a better output; AWQ rounds to nearest, beside folded scales; whole
                 columns as one group, about 4.5: 0.17 and more

and what loads cleanly and emits garbage gives: zero points off by one 0.3 to 0.4 (INT4), nibbles in
another order, scales of other groups or of a transposed grid 0.3 to 1.4, reciprocal scales more.
Limits lie between. They say nothing of a few wrong rows in a large layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mixedprec_plugin.checkpoint.formats import StoredFormat
from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.methods import registry
from mixedprec_plugin.names import nearest
from mixedprec_plugin.plan.model import PlannedLayer

_FLOAT = 0.01
_FP8 = 0.0625
_INT8 = 0.05
_INT4 = 0.33
_INT4_AWQ = 0.25
_INT4_COLUMNS = 0.45


def parse_thresholds(texts: Iterable[str]) -> dict[str, float]:
    """Read `METHOD=VALUE` as `--threshold` takes them.

    Returns:
        canonical method -> largest relative RMS error.
    Raises:
        UsageError: no such method, or no positive number.
    """
    found: dict[str, float] = {}
    for text in texts:
        method, _, value = text.partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if limit <= 0:
            what = f"{text!r} is no threshold (expected METHOD=VALUE, such as gptq=0.3)"
            raise UsageError(Problem("--threshold", what))
        if method not in registry.METHODS:
            near = nearest(method, list(registry.METHODS))
            hint = f"did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
            what = f"unknown method {method!r} (expected {', '.join(registry.METHODS)})"
            raise UsageError(Problem("--threshold", what, hint, "unknown-method"))
        found[method] = limit
    return found


def threshold_of(layer: PlannedLayer, chosen: Mapping[str, float]) -> float:
    """The largest relative RMS error of a layer: that of the coarser of its two forms.

    Args:
        chosen: method -> limit that the user chose.
    """
    limits = [chosen.get(layer.method, _served(layer))]
    if layer.stored is not None and layer.stored.family not in ("", "float"):
        family = _METHODS_OF_FAMILIES.get(layer.stored.family, "")
        limits.append(chosen.get(family, _stored(layer.stored)))
    return max(limits)


_METHODS_OF_FAMILIES = {
    "awq": "awq", "gptq": "gptq", "fp8": "fp8", "int8": "blockwise_int8", "pack-quantized": "gptq",
}  # fmt: skip


def _served(layer: PlannedLayer) -> float:
    if layer.scheme is None or layer.scheme.method == "bf16":
        return _FLOAT
    if layer.scheme.method in ("fp8", "fp8_channel"):
        return _FP8
    arguments = layer.scheme.arguments
    bits, group_size = int(arguments.get("bits", 8)), arguments.get("group_size")
    return _integers(bits, group_size, is_awq=layer.scheme.method == "awq")


def _stored(stored: StoredFormat) -> float:
    if stored.family == "fp8":
        return _FP8
    how = {**stored.dequantizer_arguments, **stored.facts}
    bits = how.get("bits", 4 if stored.family == "awq" else 8)
    return _integers(int(bits), how.get("group_size"), is_awq=stored.family == "awq")


def _integers(bits: int, group_size: object, *, is_awq: bool) -> float:
    if bits == 8:
        return _INT8
    if group_size == -1:
        return _INT4_COLUMNS
    return _INT4_AWQ if is_awq else _INT4
