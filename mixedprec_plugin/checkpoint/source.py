"""A source: a checkpoint folder as its index and headers tell it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from mixedprec_plugin.checkpoint import hub
from mixedprec_plugin.checkpoint.converted import configs_by_layer, is_converted
from mixedprec_plugin.checkpoint.fused_experts import is_fused, split_experts, why_not_split
from mixedprec_plugin.checkpoint.garbage import gc_paused
from mixedprec_plugin.checkpoint.headers import StoredTensor, file_error, read_header
from mixedprec_plugin.checkpoint.recorded import damage, reading
from mixedprec_plugin.errors import CheckpointError, Problem

INDEX_NAME = "model.safetensors.index.json"


class Facts(NamedTuple):
    """What the file system says of a file; all of it changes wherever its bytes do."""

    num_bytes: int
    changed_ns: int
    status_changed_ns: int
    inode: int


def facts_of(path: Path) -> Facts:
    """Ask the file system for a file, or for what it links to.

    Raises:
        OSError: there is none.
    """
    stat = path.stat()
    return Facts(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that layers are taken from.

    Attributes:
        name: its key in the preset; `model` is the server's --model-path.
        path: the folder.
        config: the parsed config.json.
        tensors: tensor name -> where it lies; the index decides which file is right.
        facts: file -> what the file system said of it before it was read.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    facts: Mapping[Path, Facts] = dataclasses.field(default_factory=dict)

    def check_unchanged(self, *, exact: bool = False) -> None:
        """See that the files are still those that were opened.

        Args:
            exact: whether more counts than the size and the time of the last change, which can be
                set: a file that was only renamed, linked or given away is another one then.
        Raises:
            CheckpointError: some are not.
        """
        count = len(Facts._fields) if exact else 2
        read = {self.path / "config.json", self.path / INDEX_NAME}
        read.update(tensor.path for tensor in self.tensors.values())
        problems = []
        for path in sorted(read & self.facts.keys()):
            with reading(path):
                now = facts_of(path)
            if now[:count] != self.facts[path][:count]:
                remedy = "run it again once nothing writes to it"
                problems.append(Problem(str(path), "changed while it was read", remedy, "changed"))
        if problems:
            raise CheckpointError(problems)

    @functools.cached_property
    def layers(self) -> Mapping[str, Mapping[str, StoredTensor]]:
        """Layer name -> parameter suffix -> tensor, in the order of the files.

        Experts that are stored in one tensor are layers of their own, where slices of it hold them.
        """
        layers: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in self.tensors.items():
            layer, _, suffix = name.rpartition(".")
            layers.setdefault(layer, {})[suffix] = tensor
        for name in [name for name, tensors in layers.items() if is_fused(name, tensors)]:
            if not why_not_split(layers[name], self.config):
                layers.update(split_experts(name, layers.pop(name)))
        return MappingProxyType(layers)

    @functools.cached_property
    def quantization_config(self) -> Mapping[str, Any]:
        """What config.json says of the quantization; empty where it says nothing."""
        config = self.config.get("quantization_config") or self.config.get("compression_config")
        return config if isinstance(config, Mapping) else {}

    def quantization_config_of(self, layer: str) -> Mapping[str, Any]:
        """What config.json says of one layer's quantization: of our own checkpoints, its own."""
        by_layer = self._configs_by_layer
        return self.quantization_config if by_layer is None else by_layer.get(layer, {})

    @functools.cached_property
    def _configs_by_layer(self) -> Mapping[str, Mapping[str, Any]] | None:
        config = self.quantization_config
        return MappingProxyType(configs_by_layer(config)) if is_converted(config) else None


def open_source(path: str | Path, name: str = "model", revision: str | None = None) -> Source:
    """Read a checkpoint's config.json, index and headers; no weights.

    Args:
        path: a local folder, or a Hugging Face id.
        name: the source's key in the preset.
        revision: branch, tag or commit of a Hugging Face id.
    Raises:
        CheckpointError: with every problem found: missing files, damaged headers, a tensor that
            the index promises and its file lacks.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if not hub.is_id(str(path)):
            remedy = "give a local checkpoint folder or a Hugging Face id"
            raise CheckpointError(Problem(str(path), "no such folder", remedy, "file"))
        folder = hub.snapshot_folder(str(path), revision)
    elif revision is not None:
        what = f"is a folder, which has no revision {revision!r}"
        remedy = "remove revision, or write the Hugging Face id"
        raise CheckpointError(Problem(str(path), what, remedy, "file"))
    facts = _facts(folder)
    config = _read_json(folder / "config.json")
    has_index = (folder / INDEX_NAME).is_file()
    with gc_paused():
        tensors = _read_indexed(folder) if has_index else _read_folder(folder)
        tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].path, item[1].start)))
    if problems := damage(folder):
        raise CheckpointError(problems)
    return Source(name, folder, MappingProxyType(config), MappingProxyType(tensors), facts)


def _facts(folder: Path) -> dict[Path, Facts]:
    with reading(folder):
        return {path: facts_of(path) for path in folder.glob("*") if path.is_file()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise file_error(path, f"cannot be read ({error.strerror})", "download it") from error
    except (ValueError, RecursionError) as error:
        raise file_error(path, f"is not JSON ({error})", "download it again") from error
    if not isinstance(value, dict):
        raise file_error(path, "is not a JSON object", remedy="")
    return value


def _read_indexed(folder: Path) -> dict[str, StoredTensor]:
    weight_map = _read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise file_error(folder / INDEX_NAME, "has no weight_map", "download it again")
    # what is no text is no file's name either
    weight_map = {name: str(file_name) for name, file_name in weight_map.items()}
    problems: list[Problem] = []
    headers: dict[str, dict[str, StoredTensor]] = {}
    for file_name in sorted(set(weight_map.values())):
        try:
            headers[file_name] = _header(_inside(folder, file_name))
        except CheckpointError as error:
            problems.extend(error.problems)
    tensors: dict[str, StoredTensor] = {}
    for name, file_name in weight_map.items():
        if name in headers.get(file_name, ()):
            tensors[name] = headers[file_name][name]
        elif file_name in headers:
            what = f"lacks {name!r}, which {INDEX_NAME} promises"
            problems.append(Problem(str(folder / file_name), what, "download both again", "file"))
    if problems:
        raise CheckpointError(problems)
    return tensors


def _read_folder(folder: Path) -> dict[str, StoredTensor]:
    files = [not_linked_away(file) for file in sorted(folder.glob("*.safetensors"))]
    if hub.repository_of(folder) is not None:
        # the one name that a checkpoint without an index has
        files = [not_linked_away(folder / "model.safetensors")]
    if not files:
        remedy = "only safetensors checkpoints are read; convert .bin files first"
        raise file_error(folder, "holds no safetensors file", remedy)
    if len(files) > 1 and (folder / "model.safetensors") in files:
        files = [folder / "model.safetensors"]
    problems: list[Problem] = []
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            header = _header(file)
        except CheckpointError as error:
            problems.extend(error.problems)
            continue
        remedy = f"remove the stale file, or add {INDEX_NAME}"
        for name in header.keys() & tensors.keys():
            what = f"{name!r} is also in {tensors[name].path.name}"
            problems.append(Problem(str(file), what, remedy, "file"))
        tensors.update(header)
    if problems:
        raise CheckpointError(problems)
    return tensors


def _header(path: Path) -> dict[str, StoredTensor]:
    return hub.read_remote_header(path) if hub.is_remote(path) else read_header(path)


def _inside(folder: Path, file_name: str) -> Path:
    """The file beside an index that the index names, if it is one that lies there."""
    # names that no file can have hold NUL or halves of characters
    if Path(file_name).name != file_name or not file_name.isprintable():
        what = f"names {file_name!r}, which is outside the folder"
        raise file_error(folder / INDEX_NAME, what, "an index may only name files beside it")
    return not_linked_away(folder / file_name)


def not_linked_away(path: Path) -> Path:
    """The path itself, unless it is a link out of its folder; the Hub's cache keeps files so.

    Raises:
        CheckpointError: it is.
    """
    roots = [path.parent.resolve()]
    if hub.repository_of(path.parent) is not None:
        roots.append((path.parent.parent.parent / "blobs").resolve())
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in roots):
        what = f"is a link out of its folder, to {str(target)!r}"
        raise file_error(path, what, "copy the file, or name the folder that it lies in")
    return path
