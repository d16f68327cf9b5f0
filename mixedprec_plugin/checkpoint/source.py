"""A source: a checkpoint folder as its index and headers tell it."""

from __future__ import annotations

import dataclasses
import functools
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from mixedprec_plugin.checkpoint import fused_experts as fused
from mixedprec_plugin.checkpoint import hub
from mixedprec_plugin.checkpoint.converted import configs_by_layer, folded_layers, is_converted
from mixedprec_plugin.checkpoint.files import check_place, file_error, read_json
from mixedprec_plugin.checkpoint.garbage import gc_paused
from mixedprec_plugin.checkpoint.headers import StoredTensor, read_header
from mixedprec_plugin.checkpoint.recorded import damage, reading
from mixedprec_plugin.checkpoint.records import read_config
from mixedprec_plugin.errors import CheckpointError, Problem

_NO_GGUF = "is a GGUF file, which is not read (expected a folder of safetensors)"
_NOT_GGUF = "take the model's safetensors checkpoint, which it was made from"
INDEX_NAME = "model.safetensors.index.json"
# where a transform may run: compressed-tensors `TransformLocation`
_PLACES = ("input", "output", "q_attn", "k_cache")
# of config.json, what may describe the language model of a larger one
_LANGUAGE_PARTS = ("text_config", "llm_config", "language_config")


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
        tensors: tensor name -> where it lies; the index decides which file is right.
        facts: file -> what the file system said of it before it was read.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    facts: Mapping[Path, Facts] = dataclasses.field(default_factory=dict)

    def check_unchanged(
        self, remedy: str = "run it again once nothing writes to it", *, exact: bool = False
    ) -> None:
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
                problems.append(Problem(str(path), "changed while it was read", remedy, "changed"))
        if problems:
            raise CheckpointError(problems)

    @property
    def shown(self) -> str:
        """What people call it: the id on the Hub that it is a snapshot of, or the folder."""
        repository = hub.repository_of(self.path)
        return repository[0] if repository else str(self.path)

    def is_as_opened(self, path: str | Path) -> bool:
        """Whether a path is this folder, and holds the files that it held when it was opened."""
        folder = Path(os.path.expanduser(path))
        return folder == self.path and _facts(folder) == self.facts

    @functools.cached_property
    def layers(self) -> Mapping[str, Mapping[str, StoredTensor]]:
        """Layer name -> parameter suffix -> tensor, in the order of the files.

        Experts that are stored in one tensor are layers of their own, where slices of it hold them.
        """
        layers: dict[str, dict[str, StoredTensor]] = {}
        places = self._transform_places
        for name, tensor in self.tensors.items():
            layer, _, suffix = name.rpartition(".")
            if not places or layer.rpartition(".")[2] not in places:
                layers.setdefault(layer, {})[suffix] = tensor
        count, most = 0, fused.MAX_EXPERTS
        for name in [name for name, tensors in layers.items() if fused.is_fused(name, tensors)]:
            if fused.why_not_split(layers[name], self.config):
                continue
            count += fused.num_experts(layers[name])
            if count > most:
                what = f"its files hold {count:,} experts and more (expected up to {most:,})"
                raise file_error(self.path, what)
            layers.update(fused.split_experts(name, layers.pop(name)))
        return MappingProxyType(layers)

    @functools.cached_property
    def transforms(self) -> Mapping[str, Mapping[str, StoredTensor]]:
        """`R4_input.weight` -> layer -> matrix, of the groups of compressed-tensors' transforms.

        Layers that share a matrix have it at the first of them.
        """
        found: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in self.tensors.items():
            layer, _, suffix = name.rpartition(".")
            parent, _, place = layer.rpartition(".")
            if place in self._transform_places:
                found.setdefault(f"{place}.{suffix}", {})[parent] = tensor
        return MappingProxyType(found)

    @functools.cached_property
    def _transform_places(self) -> frozenset[str]:
        """The modules that hold a layer's transforms (`TransformFactory._apply_to_module`)."""
        said = self.quantization_config.get("transform_config")
        groups = said.get("config_groups") if isinstance(said, Mapping) else None
        keys = groups if isinstance(groups, Mapping) else {}
        return frozenset(f"{key}_{place}" for key in keys for place in _PLACES)

    @functools.cached_property
    def quantization_config(self) -> Mapping[str, Any]:
        """What config.json says of the quantization; empty where it says nothing.

        It may stand with the language model of a larger one. Source: SGLang's
        model_loader/checkpoint_quantization.py:50; its configs of such models move it up.
        """
        parts = [self.config, *(self.config.get(part) for part in _LANGUAGE_PARTS)]
        said = [part.get("quantization_config") for part in parts if isinstance(part, Mapping)]
        said.append(self.config.get("compression_config"))
        return next((config for config in said if isinstance(config, Mapping) and config), {})

    def quantization_config_of(self, layer: str) -> Mapping[str, Any]:
        """What config.json says of one layer's quantization: of our own checkpoints, its own."""
        by_layer = self._configs_by_layer
        return self.quantization_config if by_layer is None else by_layer.get(layer, {})

    @functools.cached_property
    def _configs_by_layer(self) -> Mapping[str, Mapping[str, Any]] | None:
        config, path = self.quantization_config, self.path / "config.json"
        if not is_converted(config):
            return None
        # every layer has a tensor at least
        return MappingProxyType(configs_by_layer(config, len(self.tensors), path))

    @functools.cached_property
    def folded(self) -> frozenset[str]:
        """Norms and layers that `convert` divided for what reads them, by its own mark."""
        path = self.path / "config.json"
        return folded_layers(self.quantization_config, len(self.tensors), path)


def open_source(path: str | Path, name: str = "model", revision: str | None = None) -> Source:
    """Read a checkpoint's config.json, index and headers; no weights.

    Args:
        path: a local folder, or a Hugging Face id.
        revision: branch, tag or commit of a Hugging Face id.
    Raises:
        CheckpointError: with every problem found: missing files, damaged headers, a tensor that
            the index promises and its file lacks.
    """
    folder = Path(os.path.expanduser(path))
    if not os.path.isdir(folder):
        if os.path.lexists(folder):
            raise _no_folder(folder)
        if not hub.is_id(str(path)):
            remedy = "give a local checkpoint folder or a Hugging Face id"
            raise CheckpointError(Problem(str(path), "no such folder", remedy, "file"))
        folder = hub.snapshot_folder(str(path), revision)
    elif revision is not None:
        what = f"is a folder, which has no revision {revision!r}"
        remedy = "remove revision, or write the Hugging Face id"
        raise CheckpointError(Problem(str(path), what, remedy, "file"))
    facts = _facts(folder)
    if not os.path.lexists(folder / "config.json"):
        raise _no_checkpoint(folder)
    config = read_config(folder / "config.json")
    has_index = os.path.lexists(folder / INDEX_NAME)
    with gc_paused():
        tensors = _read_indexed(folder) if has_index else _read_folder(folder)
        tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].path, item[1].start)))
    if problems := damage(folder):
        raise CheckpointError(problems)
    return Source(name, folder, MappingProxyType(config), MappingProxyType(tensors), facts)


def _no_folder(path: Path) -> CheckpointError:
    """The error of a file where a folder is meant."""
    remedy = "give the checkpoint's folder"
    if os.path.lexists(path.parent / "config.json"):
        remedy = f"give its folder, {path.parent}"
    elif path.suffix == ".gguf":
        remedy = _NOT_GGUF
    return file_error(path, _NO_GGUF if path.suffix == ".gguf" else "is a file", remedy)


def _no_checkpoint(folder: Path) -> CheckpointError:
    """The error of a folder without a config.json, by what is in it."""
    names = sorted(os.listdir(folder))
    if any(name.endswith(".gguf") for name in names):
        name = next(name for name in names if name.endswith(".gguf"))
        return file_error(folder / name, _NO_GGUF, _NOT_GGUF)
    within = [name for name in names if os.path.isfile(folder / name / "config.json")]
    if within:
        return file_error(folder, "has no config.json", f"{folder / within[0]} has one")
    if not names:
        return file_error(folder, "is an empty folder", "download the checkpoint into it")
    if any(name.endswith((".safetensors", ".bin", ".pt", ".pth")) for name in names):
        return file_error(folder / "config.json", "is not there", "download it beside the weights")
    what = "is not a checkpoint: it has neither config.json nor weights"
    return file_error(folder, what, "give a folder that has both, or a Hugging Face id")


def _facts(folder: Path) -> dict[Path, Facts]:
    with reading(folder):
        return {path: facts_of(path) for path in folder.glob("*") if path.is_file()}


def _read_indexed(folder: Path) -> dict[str, StoredTensor]:
    promised = _promised(folder / INDEX_NAME)
    problems: list[Problem] = []
    tensors: dict[str, StoredTensor] = {}
    absent = [name for name in sorted(promised) if not os.path.exists(folder / name)]
    for path, header in _headers((folder / name for name in sorted(promised)), problems):
        names = promised[path.name]
        tensors |= {name: header[name] for name in names if name in header}
        if lacking := [name for name in names if name not in header]:
            what = f"lacks {_listed(lacking)}, which {INDEX_NAME} promises"
            these = "them" if lacking[1:] else "it"
            remedy = f"download both again, or take {these} out of the index"
            problems.append(Problem(str(path), what, remedy, "file"))
    if absent and problems:
        others = [file.name for file in _weight_files(folder) if file.name not in promised]
        if others:
            what = f"names files that are not there ({_listed(absent)}) and none of those that are"
            remedy = "remove the stale index if these are the whole model, or download the others"
            if hub.repository_of(folder) is not None:
                remedy = f"download it with 'hf download --local-dir' and there {remedy}"
            what = f"{what} ({_listed(others)})"
            raise file_error(folder / INDEX_NAME, what, remedy)
    if problems:
        raise CheckpointError(problems)
    return tensors


def _promised(index: Path) -> dict[str, list[str]]:
    """What an index says: file -> names of its tensors."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise file_error(index, "has no weight_map", "download it again")
    promised: dict[str, list[str]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            what = f"weight_map[{name!r}] is {reprlib.repr(file_name)} (expected a file's name)"
            raise file_error(index, what, "download it again")
        promised.setdefault(file_name, []).append(name)
    for file_name in promised:
        # names that no file can have hold NUL or halves of characters
        if Path(file_name).name != file_name or not file_name.isprintable():
            what = f"names {file_name!r}, which is outside the folder"
            raise file_error(index, what, "an index may only name files beside it")
    return promised


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(f"{name!r:.200}" for name in names[:4]) + more


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that are a checkpoint without an index.

    Of a repository on the Hub the cache may have some files or none.
    """
    whole = folder / "model.safetensors"
    files = [file for file in folder.glob("*.safetensors") if not file.name.startswith(".")]
    if whole not in files and hub.repository_of(folder) is not None:
        try:
            files = [folder / name for name in hub.file_names(folder)]
        except CheckpointError:
            if not files:
                raise
    found = [file for file in files if file.suffix == ".safetensors" and file.parent == folder]
    return [whole] if whole in found else sorted(found)


def _read_folder(folder: Path) -> dict[str, StoredTensor]:
    files = _weight_files(folder)
    if not files:
        remedy = "only safetensors checkpoints are read; convert .bin files first"
        raise file_error(folder, "holds no safetensors file", remedy)
    problems: list[Problem] = []
    tensors: dict[str, StoredTensor] = {}
    for file, header in _headers(files, problems):
        if twice := sorted(header.keys() & tensors.keys()):
            what = f"{_listed(twice)} is also in {tensors[twice[0]].path.name}"
            remedy = f"remove the stale file, or add {INDEX_NAME}"
            problems.append(Problem(str(file), what, remedy, "file"))
        tensors.update(header)
    if problems:
        raise CheckpointError(problems)
    return tensors


def _headers(
    paths: Iterable[Path], problems: list[Problem]
) -> Iterator[tuple[Path, dict[str, StoredTensor]]]:
    """Yield files and their headers; what is wrong with others goes to the problems."""
    for path in paths:
        try:
            check_place(path)
            header = hub.read_remote_header(path) if hub.is_remote(path) else read_header(path)
        except CheckpointError as error:
            problems.extend(error.problems)
        else:
            yield path, header
