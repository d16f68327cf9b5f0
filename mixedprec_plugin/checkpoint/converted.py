"""What `mixedprec convert` says in a checkpoint's `quantization_config`, and how it is read.

    {"quant_method": "mixedprec", "preset": {…}, "layers": [{"config": {…}, "names": […]}, …], …}

`config` is what a checkpoint that is wholly stored so would say, `names` are layer names, a run of
numbers in place of the first number: `model.layers.0-3,7.mlp.up_proj`. `folded` names, in the same
way, norms and layers whose outputs are divided for what reads them in this checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mixedprec_plugin.errors import CheckpointError, Problem
from mixedprec_plugin.names import fold_numbers, unfold_numbers

QUANT_METHOD = "mixedprec"
PRESET_KEY = "preset"
LAYERS_KEY = "layers"
FOLDED_KEY = "folded"

_NUMBER = re.compile(r"\d+")
# no layer has more digits
_NUMBERS = re.compile(r"\d{1,9}(?:-\d{1,9})?(?:,\d{1,9}(?:-\d{1,9})?)*")


def is_converted(quantization_config: Mapping[str, Any]) -> bool:
    """Whether `mixedprec convert` wrote the checkpoint."""
    return quantization_config.get("quant_method") == QUANT_METHOD


def embedded_preset(quantization_config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The resolved preset that a converted checkpoint carries; None where there is none."""
    preset: Mapping[str, Any] | None = quantization_config.get(PRESET_KEY)
    return preset if is_converted(quantization_config) else None


def configs_by_layer(
    quantization_config: Mapping[str, Any], max_layers: int, path: Path
) -> dict[str, Mapping[str, Any]]:
    """Layer name -> the `quantization_config` of a checkpoint that is wholly stored as it is.

    Raises:
        CheckpointError: it speaks of more.
    """
    configs: dict[str, Mapping[str, Any]] = {}
    for entry in quantization_config.get(LAYERS_KEY) or ():
        names = _unfold_all(entry["names"], max_layers, path, LAYERS_KEY)
        max_layers -= len(names)
        configs.update(dict.fromkeys(names, entry["config"]))
    return configs


def folded_layers(
    quantization_config: Mapping[str, Any], max_layers: int, path: Path
) -> frozenset[str]:
    """The layers that are right only with what reads them here; see `configs_by_layer`."""
    names = quantization_config.get(FOLDED_KEY) if is_converted(quantization_config) else None
    return frozenset(_unfold_all(names or (), max_layers, path, FOLDED_KEY))


def _unfold_all(names: Iterable[str], max_layers: int, path: Path, key: str) -> list[str]:
    found: list[str] = []
    for name in names:
        if len(found) + sum(map(len, _ranges(name))) > max_layers:
            where = f"{path}: quantization_config.{key}"
            what = f"{name!r:.200} names more layers than the checkpoint holds tensors"
            raise CheckpointError(Problem(where, what, "download it again", "record"))
        found += unfold(name)
    return found


def fold_layers(names: Iterable[str]) -> list[str]:
    """Fold names that are alike but for their first number; `unfold` gives them back."""
    groups: dict[tuple[str, str], list[int]] = {}
    folded: list[str] = []
    for name in names:
        match = _NUMBER.search(name)
        if match is None:
            folded.append(name)
        else:
            key = (name[: match.start()], name[match.end() :])
            groups.setdefault(key, []).append(int(match.group()))
    for (before, after), numbers in groups.items():
        whole = f"{before}{fold_numbers(numbers)}{after}"
        plain = [f"{before}{number}{after}" for number in sorted(numbers)]
        folded.extend([whole] if unfold(whole) == plain else plain)
    return folded


def unfold(name: str) -> list[str]:
    """`layers.0-1,3.up` -> `layers.0.up`, `layers.1.up`, `layers.3.up`."""
    match = _NUMBERS.search(name)
    if match is None:
        return [name]
    before, after = name[: match.start()], name[match.end() :]
    return [f"{before}{number}{after}" for numbers in _ranges(name) for number in numbers]


def _ranges(name: str) -> list[range]:
    """The numbers that a folded name stands for; one where it stands for itself."""
    match = _NUMBERS.search(name)
    return unfold_numbers(match.group()) if match else [range(1)]
