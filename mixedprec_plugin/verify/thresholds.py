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

import math
from collections.abc import Iterable, Mapping

from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.methods import registry
from mixedprec_plugin.plan.model import PlannedLayer


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
        if not 0 < limit < math.inf:
            what = f"{text!r} is not a threshold (expected METHOD=VALUE, such as gptq=0.3)"
            raise UsageError(Problem("--threshold", what))
        if method not in registry.METHODS:
            what = f"unknown method {method!r} (expected {', '.join(registry.METHODS)})"
            remedy = registry.suggest_method(method)
            raise UsageError(Problem("--threshold", what, remedy, "unknown-method"))
        found[method] = limit
    return found


def threshold_of(layer: PlannedLayer, chosen: Mapping[str, float]) -> float:
    """The largest relative RMS error of a layer: that of the coarser of its two forms."""
    arguments = layer.scheme.arguments if layer.scheme else {}
    served = registry.METHODS[layer.method].rounding(arguments).limit
    limits = [chosen.get(layer.method, served)]
    stored = layer.stored
    if stored is not None and stored.encoding and not stored.is_float:
        limits.append(chosen.get(stored.like, stored.limit))
    return max(limits)
