"""What a conversion is made of, so that only the same one is continued and published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixedprec_plugin import __version__
from mixedprec_plugin.checkpoint.files import check_place
from mixedprec_plugin.checkpoint.hub import fetch_if_missing
from mixedprec_plugin.checkpoint.recorded import (
    CALIBRATION_NAME,
    PROVENANCE_NAME,
    digest_of,
    reading,
)
from mixedprec_plugin.checkpoint.source import facts_of
from mixedprec_plugin.convert.folder import CONFIG_NAME
from mixedprec_plugin.convert.parts import Part
from mixedprec_plugin.convert.provenance import LAYERS, are_unchanged, tensors_read
from mixedprec_plugin.plan.model import Plan

# raised whenever the same inputs would give other files
LAYOUT_VERSION = 1
INPUTS = {"type": "object", "additionalProperties": {"type": "string"}}
# of a finished conversion's provenance
RECORDED = {
    "type": "object",
    "required": ["inputs", "layers"],
    "properties": {"inputs": INPUTS, "layers": LAYERS},
}
# a model's files that say nothing of its weights are copied; these do, or are weights
_LEFT_OUT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt"}
)
_LEFT_OUT_NAMES = frozenset(
    {
        CONFIG_NAME, "quantize_config.json", "quantization_config.json", "quant_config.json",
        "hf_quant_config.json", PROVENANCE_NAME, CALIBRATION_NAME,
    }
)  # fmt: skip
_SOURCES = "the sources' files"


def copied_files(model: Path) -> list[Path]:
    """The model's files that go with any weights: tokenizer, templates, code, licence.

    Raises:
        CheckpointError: one is a link out of the folder, or the folder cannot be read.
    """
    with reading(model):
        found = [
            path
            for path in sorted(model.iterdir())
            if (path.is_file() or (path.is_symlink() and not path.exists()))
            and path.suffix not in _LEFT_OUT_SUFFIXES
            and path.name not in _LEFT_OUT_NAMES
            and not path.name.startswith(".")
            and not path.name.endswith(".index.json")
        ]
    for path in found:
        check_place(path)
    return found


def input_facts(
    plan: Plan, form: str, parts: Sequence[Part], copied: Mapping[str, str], rounding: str
) -> dict[str, str]:
    """Everything that decides a byte of the output, each kind of it as one digest.

    Weights are known by what the file system says of their files; see `changed`.

    Args:
        copied: name -> SHA-256 of the files that are copied.
        rounding: what else decides codes.
    Returns:
        what it is, in words -> digest; two conversions are the same if all are.
    Raises:
        CheckpointError: a file cannot be had.
    """
    # the model's, and of other sources what layers under `auto` are written with
    said = {name: dict(source.quantization_config) for name, source in plan.sources.items()}
    paths = sorted({tensor.path for layer in plan.layers for tensor in tensors_read(layer)})
    return {
        "the release": f"{__version__} layout {LAYOUT_VERSION}",
        "the format": form,
        "the dtype": plan.target.dtype,
        "the preset": plan.preset.digest,
        "config.json": digest_of([dict(plan.source.config), said]),
        _SOURCES: digest_of([_identity(path) for path in paths]),
        "the model's other files": digest_of(copied),
        "the calibration": rounding,
        "how the files are split": digest_of([[part.file, len(part.tensors)] for part in parts]),
        "the plan": digest_of([part.header.decode("latin-1") for part in parts]),
    }


def _identity(path: Path) -> list[object]:
    """A source's file, downloaded if the cache has not got it."""
    fetch_if_missing(path)
    with reading(path):
        return [str(path.resolve()), *facts_of(path)]


def changed(
    before: Mapping[str, str],
    now: Mapping[str, str],
    layers: Iterable[Mapping[str, Any]] | None,
    plan: Plan,
) -> list[str]:
    """What differs between two conversions, in words.

    Files of the sources that differ in what the file system says of them are read again where all
    the rest is the same: only other bytes are a difference.

    Args:
        layers: what is there of the one before, as `layer_provenance` makes it; None where that
            is not known, and nothing is read.
    Raises:
        CheckpointError: a file cannot be read.
    """
    found = [key for key in now if before.get(key) != now[key]]
    is_read = found == [_SOURCES] and layers is not None
    return [] if is_read and are_unchanged(layers or (), plan) else found
