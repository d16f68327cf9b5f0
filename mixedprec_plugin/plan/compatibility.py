"""Whether the sources of a plan are checkpoints of one model.

Tools that quantize leave the embedding alone; those that rotate weights (QuaRot, SpinQuant) change
it, and then layers of the two work on different activations. What the model's config.json decides
(dtype, dropout, lengths and scaling of positions) may differ, and rows that pad the vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.checkpoint.values import Values, are_equal
from mixedprec_plugin.errors import Problem, Severity
from mixedprec_plugin.families.config import architecture, sizes
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods.recognition import FormatCache
from mixedprec_plugin.methods.transforms import TRANSFORMS, of_weights
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.preset.model import Preset

# tools pad the vocabulary to multiples of up to 512 rows
_PADDING = 512
_NUM_ROWS = 16


def check_sources(
    preset: Preset,
    layers: Sequence[PlannedLayer],
    sources: Mapping[str, Source],
    values: Values,
    formats: FormatCache,
) -> list[Problem]:
    """Hold every source that a layer comes from against the model's own checkpoint.

    Returns:
        one problem for each source that differs, with every difference.
    Raises:
        CheckpointError: an embedding or a norm cannot be read.
    """
    model = sources["model"]
    severity: Severity = "warning" if preset.trust_sources else "error"
    problems = []
    for name in sorted({layer.source for layer in layers} - {"model"}):
        source = sources[name]
        differences = [
            *_config_differences(source, model),
            *_shape_differences(layers, source, model, formats),
            *_embedding_differences(layers, source, model, values),
            *_norm_differences(layers, source, model, values),
        ]
        if differences:
            where = str(preset.sources[name].location) if name in preset.sources else name
            what = f"is a checkpoint of another model than {model.path}: {'; '.join(differences)}"
            remedy = "take a checkpoint of the same model, or set trust_sources: true"
            problems.append(Problem(where, what, remedy, "source-model", severity))
    return problems


def _config_differences(source: Source, model: Source) -> Iterator[str]:
    """Yield where two config.json differ; what only one of them tells is no difference."""
    got, expected = architecture(source.config), architecture(model.config)
    if got and expected and got != expected:
        yield f"its architecture is {got} (expected {expected})"
    own = sizes(model.config)
    for key, size in sizes(source.config).items():
        if key in own and not _is_same(key, size, own[key]):
            yield f"{key} is {size} (expected {own[key]})"
    # rotations that are wholly in the weights of one; random ones are never alike
    theirs, ours = (of_weights(s.quantization_config) for s in (source, model))
    if theirs != ours or re.search(r"random(?!ize': False)", str(theirs)):
        yield f"{TRANSFORMS} in its config.json rotates its weights"


def _is_same(key: str, got: Any, expected: Any) -> bool:
    if key == "vocab_size":
        return abs(int(got) - int(expected)) < _PADDING
    if isinstance(got, float) or isinstance(expected, float):
        return math.isclose(float(got), float(expected), rel_tol=1e-6)
    return bool(got == expected)


def _shape_differences(
    layers: Iterable[PlannedLayer], source: Source, model: Source, formats: FormatCache
) -> list[str]:
    found: dict[str, list[str]] = {}
    for layer in layers:
        if layer.source != source.name:
            continue
        ours, theirs = (_shape(layer.name, s, formats) for s in (model, source))
        if ours and theirs and ours != theirs:
            text = f"is {list(theirs)} (expected {list(ours)})"
            found.setdefault(text, []).append(layer.name)
    return [f"{', '.join(fold_names(names))} {text}" for text, names in found.items()]


def _shape(name: str, source: Source, formats: FormatCache) -> tuple[int, ...]:
    """A layer's shape, unpacked; empty where nothing tells."""
    stored = formats.of(source, name)
    if stored is not None:
        return (stored.N, stored.K) if stored.N and stored.K else ()
    weight = source.layers[name].get("weight")
    return weight.shape if weight is not None else ()


def _embedding_differences(
    layers: Iterable[PlannedLayer], source: Source, model: Source, values: Values
) -> list[str]:
    """Compare rows of the embedding, spread over the vocabulary, where both store it in floats."""
    import numpy as np

    found = []
    for name in (layer.name for layer in layers if layer.kind == "embedding"):
        theirs, ours = (_matrix(name, s) for s in (source, model))
        if theirs is None or ours is None or theirs.shape[1] != ours.shape[1]:
            continue
        num_rows = min(theirs.shape[0], ours.shape[0])
        # the ends of a vocabulary are special tokens; stay between them
        indices = [num_rows * (2 * i + 1) // (2 * _NUM_ROWS) for i in range(_NUM_ROWS)]
        rows = [values.rows(tensor, indices) for tensor in (theirs, ours)]
        dtypes = (theirs.dtype, ours.dtype)
        num_different = sum(not are_equal(a, b, dtypes) for a, b in zip(*rows, strict=True))
        if num_different:
            length = float(np.linalg.norm(rows[0]) * np.linalg.norm(rows[1]))
            cosine = float((rows[0] * rows[1]).sum()) / length if length else 0.0
            text = f"{num_different} of {_NUM_ROWS} sampled rows of {name} differ"
            found.append(f"{text} (cosine {cosine:.3f})")
    return found


def _matrix(name: str, source: Source) -> StoredTensor | None:
    weight = source.layers.get(name, {}).get("weight")
    is_float = weight is not None and weight.dtype in ("BF16", "F16", "F32", "F64")
    return weight if weight is not None and is_float and len(weight.shape) == 2 else None


def _norm_differences(
    layers: Iterable[PlannedLayer], source: Source, model: Source, values: Values
) -> list[str]:
    """Norms that are no positive multiple, feature by feature: scales that tools fold are."""
    import numpy as np

    names = []
    offset = family_of(model.config).norm_offset
    if offset is None:
        return []
    for layer in layers:
        theirs, ours = (s.layers.get(layer.name, {}).get("weight") for s in (source, model))
        is_norm = layer.kind == "norm" and layer.name.endswith("norm")
        if not is_norm or theirs is None or ours is None or theirs.shape != ours.shape:
            continue
        if len(ours.shape) != 1 or not (values.can_read(theirs) and values.can_read(ours)):
            continue
        one, other = values.of(theirs) + offset, values.of(ours) + offset
        is_noise = np.minimum(np.abs(one), np.abs(other)) < 1e-3
        if np.mean((np.sign(one) != np.sign(other)) & ~is_noise) > 0.01:
            names.append(layer.name)
    return [f"the signs of {', '.join(fold_names(names))} differ"] if names else []
