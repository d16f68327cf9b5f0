"""What the plan's rules say of a cell without looking at SGLang."""

from __future__ import annotations

from typing import Literal

import yaml

from mixedprec_plugin.methods.cards import Gpu
from mixedprec_plugin.methods.interface import LayerShape, Target
from mixedprec_plugin.methods.registry import bind
from mixedprec_plugin.methods.remedies import find_faults
from tests.dryrun.cards import Card
from tests.dryrun.layers import Kind
from tests.dryrun.methods import Method

_STORED_DTYPES = {"bfloat16": "BF16", "float16": "F16"}


def foretell(card: Card, method: Method, kind: Kind, tp_size: int, dtype: str) -> list[str]:
    """Return why a cell cannot run; empty if it can.

    Args:
        dtype: what the model runs in, as torch spells it.
    """
    arguments = yaml.safe_load(f"{{{method.rule}}}")
    name, bound = bind(arguments.pop("method"), arguments)
    reasons = []
    for shape in _shapes(kind, tp_size, _STORED_DTYPES[dtype]).values():
        target = Target(gpu=Gpu(card.name, card.architecture))
        reasons += [fault.text for fault in find_faults(name, bound, shape, target)]
    return list(dict.fromkeys(reasons))


def _shapes(kind: Kind, tp_size: int, dtype: str) -> dict[str, LayerShape]:
    parallel: Literal["column", "row", "replicated"] = "replicated"
    if kind.splits_inputs or kind.splits_outputs:
        parallel = "row" if kind.splits_inputs else "column"
    return {
        name: LayerShape(
            N=N,
            K=K,
            shard_sizes=tuple(size for size, _ in kind.weights.values()),
            parallel=parallel,
            tp_size=tp_size,
            dtype=dtype,
            shard_ranks=tuple(kind.num_ranks(shard, tp_size) for shard in kind.weights),
            is_head=name == "lm_head",
        )
        for name, (N, K) in kind.weights.items()
    }
