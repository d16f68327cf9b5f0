"""The layers and references of the GPU tests on the CPU platform, in a process of its own.

python -m tests.gpu.on_cpu

Prints a JSON object: cell -> how far off it is, as text; those that are not within their limits
start with "WRONG".
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping

from tests.dryrun.methods import METHODS
from tests.gpu.exact import Off

KINDS = ("column", "qkv", "row")


def main() -> None:
    """Run every method in a few kinds of layers, and every layer of experts."""
    warnings.simplefilter("ignore")
    from tests.dryrun.experts import RULES
    from tests.gpu import test_experts, test_layers

    found = {}
    for method in METHODS:
        for kind in KINDS:
            _, off = test_layers.differences(method.title, kind, 1, "cpu")
            found[f"{method.title}, {kind}"] = _say(off)
    for title in RULES:
        for tp_size in (1, 2):
            _, off = test_experts.differences(title, "experts", tp_size, "cpu")
            found[f"experts {title}, tp {tp_size}"] = _say(off)
    print(json.dumps(found))


def _say(off: Mapping[int, Off]) -> str:
    text = "; ".join(f"{key}: {value}" for key, value in off.items())
    return text if all(value.is_within for value in off.values()) else f"WRONG {text}"


if __name__ == "__main__":
    main()
