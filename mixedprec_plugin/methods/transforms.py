"""What a `quantization_config` does to a checkpoint's layers beside rounding them.

Of compressed-tensors' `transform_config` (QuIP and SpinQuant as llm-compressor writes them):

    weight_input, weight_output    in the weights already. Between layers (R1, R2) they cancel out
                                   in the model, and only set it apart from other checkpoints of it
    q_attn with k_cache (R3)       run, and cancel out in the attention's products
    input, output (R4, QuIP)       run, and undo what is in the weight

What runs is taken into the layer's weight, which then is what the checkpoint's layer computes, and
the layer of the model without transforms where its weight holds the counterpart. Nothing runs them
in SGLang: the stored codes alone mean something else.

Rotations that other tools tell of without their matrices, and sparse storage, are refused by name.
Source: compressed-tensors 0.18, `TransformFactory`, `HadamardTransform`, `RandomMatrixTransform`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.families.names import layer_kind
from mixedprec_plugin.families.table import DECODER
from mixedprec_plugin.methods.stored import StoredFormat, Turn, matches, strings

TRANSFORMS = "transform_config"
# `R4_input.weight` -> layer -> matrix
Matrices = Mapping[str, Mapping[str, StoredTensor]]
# compressed-tensors `TransformLocation`: what is in the weights, what cancels out in attention, and
# what runs with a layer
_IN_WEIGHTS = {"weight_input", "weight_output"}
_IN_ATTENTION = {"q_attn", "k_cache"}
_WITH_LAYER = {"input": "weight_input", "output": "weight_output"}
_HADAMARD = frozenset({"hadamard", "random-hadamard"})
_TYPES = _HADAMARD | {"random-matrix"}
# whose layers have a weight that is served as it is read
_TURNED = frozenset({"linear", "expert", "lm_head"})
_CLASSES = frozenset({"Linear", "Embedding"})
_CLASS = re.compile(r"[A-Z]\w*")
# of GPTQModel, Quark, QuaRot, SpinQuant, FP-Quant, auto-round
_ROTATION = re.compile(r"rotat|hadamard|quarot|spinquant", re.IGNORECASE)
_NAMING = frozenset({"name", "method", "type", "algo"})
_OFF = frozenset({"", "none", "null", "false", "off"})


def turned(
    found: StoredFormat, config: Mapping[str, Any], name: str, matrices: Matrices
) -> StoredFormat:
    """Give a layer's format what its inputs and outputs are multiplied by, or the obstacle.

    Args:
        found: how its weight is stored.
        matrices: as of `Source.transforms`.
    Raises:
        CheckpointError: a pattern is no regular expression.
    """
    if found.obstacle or not config.get(TRANSFORMS):
        return found
    turns: dict[str, Turn] = {}
    held: dict[str, StoredTensor] = {}
    kind = layer_kind(name, has_matrix=True, family=DECODER)
    for key, scheme, step in _running(config, name, kind == "embedding"):
        place = str(step.get("location"))
        why = _why_not_turned(scheme, step, name) or (
            f"another one transforms its {place}, too" if place in turns else ""
        )
        if not why and not (kind in _TURNED and found.is_readable and found.N and found.K):
            why = f"this release does not undo that in {found.description} of this kind of layer"
        made: tuple[Turn, dict[str, StoredTensor]] | str = why
        if not why:
            made = _turn(key, scheme, step, (found.N, found.K), name, matrices)
        if isinstance(made, str):
            text = f"{TRANSFORMS} of config.json transforms it by {key!r} as it runs ({place})"
            return dataclasses.replace(found, obstacle=f"{text}, and {made}")
        turns[place], tensors = made
        held |= tensors
    own = {suffix for suffix, layers in matrices.items() if name in layers}
    if beside := sorted(own - held.keys()):
        text = f"this release does not know the {' and '.join(beside)} below it"
        return dataclasses.replace(found, obstacle=text)
    if not turns:
        return found
    return dataclasses.replace(
        found,
        method=found.method if found.is_float else "",
        description=f"{found.description} with {TRANSFORMS}",
        suffixes=(found.suffixes or frozenset({"weight"})) | held.keys(),
        turns=tuple(turns.values()),
        matrices=held,
    )


def _running(
    config: Mapping[str, Any], name: str, is_embedding: bool
) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """(key, scheme, step) of each that runs with a layer, or with a module that it is in."""
    modules = name.split(".")
    above = [".".join(modules[:end]) for end in range(1, len(modules))]
    for key, scheme in _schemes(config):
        for step in scheme["apply"]:
            if step.get("location") in _IN_WEIGHTS or _cancels_in_attention(scheme):
                continue
            names = [name, *above]
            if _is_target(step, name, is_embedding) or any(
                _is_said(strings(step.get("targets")), module)
                and not _is_said(strings(step.get("ignore")), module)
                for module in names
            ):
                yield key, scheme, step


def _cancels_in_attention(scheme: Mapping[str, Any]) -> bool:
    """Whether queries and keys are rotated alike, so that their products are what they were."""
    steps = scheme["apply"]
    is_pair = len(steps) == 2 and {step.get("location") for step in steps} == _IN_ATTENTION
    what = [tuple(step.get(key) for key in ("targets", "ignore", "inverse")) for step in steps]
    return is_pair and what[0] == what[1] and scheme.get("type") in _HADAMARD


def _why_not_turned(scheme: Mapping[str, Any], step: Mapping[str, Any], name: str) -> str:
    """Say what of a step that runs is not known; empty if it all is."""
    targets = strings(step.get("targets"))
    if step.get("location") not in _WITH_LAYER:
        return "this release does not know what that does to its weight"
    if scheme.get("type") not in _TYPES:
        known = ", ".join(sorted(_TYPES))
        return f"its type {scheme.get('type')!r:.40} is not known (expected {known})"
    if not isinstance(step.get("inverse", False), bool):
        return f"inverse is {step['inverse']!r:.40} (expected true or false)"
    if not _is_said(targets, name) and not any(target in _CLASSES for target in targets):
        return "this release undoes only what layers are named for, or their class, Linear"
    return ""


def _turn(
    key: str,
    scheme: Mapping[str, Any],
    step: Mapping[str, Any],
    shape: tuple[int, int],
    name: str,
    matrices: Matrices,
) -> tuple[Turn, dict[str, StoredTensor]] | str:
    """What a step does to a layer [N, K], and the tensors of it; or why that is not known."""
    place = str(step["location"])
    features = shape[place == "input"]
    size = features if scheme.get("head_dim") is None else scheme["head_dim"]
    if type(size) is not int or size <= 0 or features % size:
        return f"its head_dim {size!r:.40} does not divide {features}"
    found = [_stored(matrices.get(f"{key}_{place}.weight", {}), name, (size, size))]
    if scheme.get("randomize"):
        found.append(_stored(matrices.get(f"{key}_{place}.perm", {}), name, (size,)))
    if any(len(some) > 1 for some in found) or (len(found) == 2 and not all(found)):
        return "does not store which one it is"
    held = [next(iter(some), None) for some in found]
    suffixes = [
        f"{key}_{place}.{suffix}" if tensor else ""
        for suffix, tensor in zip(("weight", "perm"), held, strict=False)
    ]
    is_sylvester = scheme["type"] == "hadamard" and size & (size - 1) == 0
    if held[0] is None and (not is_sylvester or scheme.get("requires_grad")):
        return f"its matrix [{size}, {size}] is not stored"
    is_hadamard = scheme["type"] in _HADAMARD
    # the inverse of another matrix is stored as such
    is_transposed = is_hadamard and step.get("inverse", False)
    turn = Turn(place, size, suffixes[0], "".join(suffixes[1:]), is_hadamard, is_transposed)
    return turn, {s: tensor for s, tensor in zip(suffixes, held, strict=True) if tensor}


def _stored(
    layers: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...]
) -> list[StoredTensor]:
    """A layer's own tensor, or those of its shape that others have: one, where it is shared."""
    own = [layers[name]] if name in layers else list(layers.values())
    return [tensor for tensor in own if tensor.shape == shape]


def why_transformed(config: Mapping[str, Any], name: str) -> str:
    """Say what a checkpoint does to a layer that its tensors do not tell; empty if nothing.

    Raises:
        CheckpointError: a pattern is no regular expression.
    """
    if path := next(_rotations(config), ""):
        return f"{path} in its quantization_config says that weights are rotated"
    sparsity = config.get("sparsity_config")
    form = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if isinstance(sparsity, Mapping) and form not in (None, "dense") and _is_target(sparsity, name):
        return f"sparsity_config of config.json stores it as {form}"
    return ""


def of_weights(config: Mapping[str, Any]) -> object:
    """What stays in weights once what runs is in them, too; None if nothing does.

    It is compared with what another checkpoint says.
    """
    left = {key: scheme for key, scheme in _schemes(config) if not _cancels(scheme)}
    return left or None


def _cancels(scheme: Mapping[str, Any]) -> bool:
    """Whether what runs undoes what is in the weights, layer by layer."""

    def said(places: Mapping[str, str], flips: bool) -> list[tuple[Any, ...]]:
        return [
            (places[step["location"]], step.get("inverse", False) is not flips,
             sorted(strings(step.get("targets"))), sorted(strings(step.get("ignore"))))
            for step in scheme["apply"]
            if step.get("location") in places
        ]  # fmt: skip

    if _cancels_in_attention(scheme):
        return True
    run, stored = said(_WITH_LAYER, True), said({x: x for x in _IN_WEIGHTS}, False)
    return sorted(run) == sorted(stored) and len(run) + len(stored) == len(scheme["apply"])


def patterns(config: Mapping[str, Any]) -> list[str]:
    """Every target, and what is ignored."""
    steps = [step for _, scheme in _schemes(config) for step in scheme["apply"]]
    return [
        text for step in steps for key in ("targets", "ignore") for text in strings(step.get(key))
    ]


def _schemes(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, scheme) of each group of `transform_config`; its steps are mappings."""
    said = config.get(TRANSFORMS)
    groups = said.get("config_groups") if isinstance(said, Mapping) else said
    if not isinstance(groups, Mapping):
        groups = {TRANSFORMS: groups or said} if groups or said else {}
    for key, scheme in groups.items():
        steps = scheme.get("apply") if isinstance(scheme, Mapping) else None
        is_known = isinstance(scheme, Mapping) and isinstance(scheme.get("type", ""), str)
        if is_known and isinstance(steps, list) and all(map(_has_place, steps)):
            yield key, scheme
        else:
            yield key, {"apply": [{"targets": "re:", "location": "?"}]}


def _has_place(step: Any) -> bool:
    return isinstance(step, Mapping) and isinstance(step.get("location"), str)


def _is_target(said: Mapping[str, Any], name: str, is_embedding: bool = False) -> bool:
    """Whether a layer is among `targets` and not in `ignore`; all are, where none are named."""
    named, own = (
        strings(said.get("targets")) or ["Linear"],
        "Embedding" if is_embedding else "Linear",
    )
    ignored = strings(said.get("ignore"))
    return (
        any(target == own for target in named)
        or any(_CLASS.fullmatch(target) and target not in _CLASSES for target in named)
        or _is_said(named, name)
    ) and not (own in ignored or _is_said(ignored, name))


def _is_said(targets: list[str], name: str) -> bool:
    """Whether a module is named, or a pattern matches its name."""
    return any(
        matches(target[3:], name) if target.startswith("re:") else target == name
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
