"""What a `quantization_config` does to a checkpoint's layers beside rounding them.

Rotations and other transforms that run with the model, and sparse storage, change what a layer's
weight means: such layers are refused by name. Transforms that are wholly in the weights leave the
model what it is; they only set it apart from other checkpoints of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mixedprec_plugin.methods.stored import matches, strings

TRANSFORMS = "transform_config"
# compressed-tensors `TransformLocation`: what is in the weights, and what cancels out in attention
_IN_WEIGHTS = {"weight_input", "weight_output"}
_IN_ATTENTION = {"q_attn", "k_cache"}
# of GPTQModel, Quark, QuaRot, SpinQuant, FP-Quant, auto-round
_ROTATION = re.compile(r"rotat|hadamard|quarot|spinquant", re.IGNORECASE)
_NAMING = frozenset({"name", "method", "type", "algo"})
_OFF = frozenset({"", "none", "null", "false", "off"})


def why_transformed(config: Mapping[str, Any], name: str) -> str:
    """Say what a checkpoint does to a layer that its weight alone does not tell; empty if nothing.

    Raises:
        CheckpointError: a pattern is no regular expression.
    """
    for key, steps in _schemes(config):
        places = {str(step.get("location")) for step in steps}
        is_plain = places <= _IN_WEIGHTS or places == _IN_ATTENTION
        if not is_plain and any(_is_target(step, name) for step in steps):
            runs = ", ".join(sorted(places - _IN_WEIGHTS))
            return f"{TRANSFORMS} of config.json transforms it by {key!r} as it runs ({runs})"
    if path := next(_rotations(config), ""):
        return f"{path} in its quantization_config says that weights are rotated"
    sparsity = config.get("sparsity_config")
    form = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if isinstance(sparsity, Mapping) and form not in (None, "dense") and _is_target(sparsity, name):
        return f"sparsity_config of config.json stores it as {form}"
    return ""


def of_weights(config: Mapping[str, Any]) -> object:
    """What is transformed, to be compared with what another checkpoint says; None if nothing is."""
    return config.get(TRANSFORMS) if any(True for _ in _schemes(config)) else None


def _schemes(config: Mapping[str, Any]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """(name, steps) of each scheme of `transform_config`."""
    said = config.get(TRANSFORMS)
    groups = said.get("config_groups") if isinstance(said, Mapping) else said
    if not isinstance(groups, Mapping):
        groups = {TRANSFORMS: groups or said} if groups or said else {}
    for key, scheme in groups.items():
        steps = scheme.get("apply") if isinstance(scheme, Mapping) else None
        is_known = isinstance(steps, list) and all(isinstance(step, Mapping) for step in steps)
        yield (
            key,
            steps if is_known and steps is not None else [{"targets": "re:", "location": "?"}],
        )


def _is_target(said: Mapping[str, Any], name: str) -> bool:
    """Whether a layer is among `targets` and not in `ignore`; all are, where none are named."""
    return _is_named(strings(said.get("targets")) or ["Linear"], name) and not _is_named(
        strings(said.get("ignore")), name
    )


def _is_named(targets: list[str], name: str) -> bool:
    return any(
        matches(target[3:], name) if target.startswith("re:") else target in (name, "Linear")
        for target in targets
    )


def _rotations(value: Any, path: str = "") -> Iterator[str]:
    """Yield the keys that say that weights are rotated, whatever tool writes them."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            where = f"{path}.{key}" if path else str(key)
            is_off = not inner or str(inner).lower() in _OFF
            names = str(inner) if key in _NAMING and isinstance(inner, str) else str(key)
            # a layer's name is no key of the tool's
            if key != TRANSFORMS and not is_off and "." not in names and _ROTATION.search(names):
                yield where
            elif key != TRANSFORMS:
                yield from _rotations(inner, where)
    elif isinstance(value, list):
        # not into lists of as many names as a model has layers
        for inner in [part for part in value if type(part) in (dict, list)]:
            yield from _rotations(inner, path)
