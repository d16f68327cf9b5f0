"""Scores that were made before, beside the checkpoint or in the cache where that is read-only.

A file holds those on one basis, by unit and candidate: other methods need but theirs.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mixedprec_plugin.checkpoint.recorded import digest_of, file_digest
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.errors import CheckpointError, ConvertError, Problem
from mixedprec_plugin.preset.model import Scheme
from mixedprec_plugin.resources import cache_root
from mixedprec_plugin.search.candidates import Choices

# unit name -> candidate name -> what it costs
Scores = dict[str, dict[str, float]]
# unit name -> names of the candidates to score
Wanted = Mapping[str, Collection[str]]

# raised where scores are made otherwise
_VERSION = 3
_FOLDER = ".mixedprec"


@dataclasses.dataclass(frozen=True)
class Basis:
    """What scores are made on.

    Attributes:
        text: a file, or None for text that the model writes.
        windows: pieces of it that candidates are made with.
        held_out: further pieces, which they are scored on.
        length: tokens of a piece.
        seed: of the text and the labels.
        gradients: whether errors are weighed by the gradient of the model's own predictions.
        inputs: a folder of what a serving engine's layers read, in place of any text; see
            `calibrate.gathered`.
        in_engine: whether a serving engine is measured; of a text only what is held out counts.
    """

    text: Path | None = None
    windows: int = 64
    held_out: int = 16
    length: int = 128
    seed: int = 0
    gradients: bool = True
    inputs: Path | None = None
    in_engine: bool = False


class KeptScores:
    """The scores of a model's candidates on a basis.

    Args:
        inputs: what the files of `basis.inputs` say of themselves.
    """

    def __init__(self, choices: Choices, basis: Basis, inputs: object = None) -> None:
        self.basis, model = basis, choices.base.source
        self.facts = {
            "version": _VERSION, "model": _identity(model), "dtype": choices.base.target.dtype,
            **dataclasses.asdict(basis),
            "text": file_digest(basis.text) if basis.text else "written by the model",
            "inputs": inputs,
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }  # fmt: skip
        # other bytes of its source are another candidate
        others = {name: _identity(source) for name, (_, source) in choices.others.items()}
        self._keys = {
            name: _key(one.scheme) + others.get(one.scheme.source, "")
            for name, one in choices.candidates.items()
        }
        self._digest = digest_of(self.facts)[:16]
        self._places = [model.path / _FOLDER, cache_root() / "scores"]

    def folder(self, name: str = "") -> Path:
        """Where scores are written, or a folder of that name there; made if it is not there."""
        for folder in (place / name for place in self._places):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError:
                continue
            if os.access(folder, os.W_OK):
                return folder
        remedy = "set MIXEDPREC_CACHE to a folder that can"
        raise ConvertError(Problem(str(self._places[-1]), "cannot be written", remedy, "write"))

    @property
    def path(self) -> Path | None:
        """The file that holds scores; None where there is none."""
        found = (place / f"scores-{self._digest}.json" for place in self._places)
        return next((path for path in found if path.is_file()), None)

    def read(self) -> Scores:
        """The scores that are there."""
        path = self.path
        if path is None:
            return {}
        names = {key: name for name, key in self._keys.items()}
        return {
            unit: {names[key]: score for key, score in own.items() if key in names}
            for unit, own in _read(path).items()
        }

    def write(self, scores: Scores) -> None:
        """Add scores to those that are there."""
        path = self.path or self.folder() / f"scores-{self._digest}.json"
        known = _read(path) if path.exists() else {}
        for unit, own in scores.items():
            known.setdefault(unit, {}).update({self._keys[name]: x for name, x in own.items()})
        temporary = path.with_suffix(".tmp")
        try:
            text = json.dumps({"facts": self.facts, "scores": known}, default=str)
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            what = f"cannot be written ({error.strerror})"
            raise ConvertError(Problem(str(path), what, "make room", "write")) from error


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["scores"]
    except (OSError, ValueError, KeyError) as error:
        what = f"is not a file of scores ({error})"
        raise CheckpointError(Problem(str(path), what, "remove it", "scores")) from error


def _key(scheme: Scheme) -> str:
    return json.dumps([scheme.method, dict(scheme.arguments), scheme.source], sort_keys=True)


def _identity(source: Source) -> str:
    """A digest of a checkpoint: its config, and where which tensor lies in files of which size."""
    sizes = {
        path.name: (facts.num_bytes, facts.changed_ns)
        for path, facts in source.facts.items()
        if path.suffix == ".safetensors"
    }
    tensors = [(t.path.name, name, t.dtype, t.shape) for name, t in source.tensors.items()]
    return digest_of([dict(source.config), sizes, tensors])
