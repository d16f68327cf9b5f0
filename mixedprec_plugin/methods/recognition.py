"""A layer's tensors and `quantization_config` -> the format that it is stored in.

Headers are all that is read. Tensors decide: the whole-checkpoint `quantization_config` may name a
method that one layer is not stored in, or leave out one that it is. The config only says what
headers cannot (block sizes of ragged grids, GPTQ's zero convention, the direction of a scale);
where the two contradict each other, the format says so in its `disagreements`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import operator
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from mixedprec_plugin.checkpoint.fused_experts import is_fused
from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.families.names import NEVER_QUANTIZED, last_component, layer_kind
from mixedprec_plugin.families.table import DECODER
from mixedprec_plugin.methods.auto import why_no_class
from mixedprec_plugin.methods.foreign import FOREIGN
from mixedprec_plugin.methods.foreign.named import BUFFERS, is_coded, unrecognized
from mixedprec_plugin.methods.interface import Fault, Format, LayerShape, Method, Target
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.methods.remedies import find_faults
from mixedprec_plugin.methods.stored import (
    FLOAT,
    FLOAT_DTYPES,
    Said,
    StoredFormat,
    Tensors,
    matches,
    strings,
)
from mixedprec_plugin.methods.transforms import Matrices, patterns, turned, why_transformed
from mixedprec_plugin.names import without_numbers

_NOT_IN_BLOCKS = re.compile(r"\D*")
# ModelOpt's, of AWQ and SmoothQuant: y = W (x * pre_quant_scale) (modelopt_quant.py:2106)
_FACTOR = "pre_quant_scale"
# of the key-value cache, and of what layers give
_OF_ACTIVATIONS = re.compile(r"(?:[kqv]|kv|prob|output)_(?:scale|zero_point)")
_SERVED = frozenset({"linear", "expert", "lm_head"})
_OTHERWISE = "name a method for the experts, or take them from another source"
_IGNORE_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")


def formats() -> tuple[Format, ...]:
    """Every format, in the order in which they are asked: the methods', then those only read."""
    return (*METHODS.values(), *FOREIGN)


def recognize(
    tensors: Tensors,
    quantization_config: Mapping[str, Any],
    name: str = "",
    matrices: Matrices = MappingProxyType({}),
) -> StoredFormat | None:
    """Tell how a layer with a weight matrix is stored, and where config.json says otherwise.

    Args:
        tensors: parameter suffix -> tensor, all of one layer.
        quantization_config: what the source's config.json says; may be empty.
        name: the layer's name, which ignore lists and overrides are held against.
        matrices: as of `Source.transforms`.
    Returns:
        the format; None where the layer holds no weight matrix (a norm, say).
    Raises:
        CheckpointError: a pattern in `quantization_config` is no regular expression.
    """
    said = said_of(quantization_config, name)
    no_class = why_no_class(quantization_config)
    for one in formats():
        if found := one.recognize(tensors, said):
            found = dataclasses.replace(
                found,
                said=said.of(found.encoding) if found.encoding else {},
                disagreements=(*found.disagreements, *_contradictions(found, said)),
                no_class=found.no_class or no_class,
                format=one.name,
            )
            found = _with_what_is_beside(found, tensors, quantization_config, name)
            return turned(found, quantization_config, name, matrices)
    # a projection has a matrix, whatever its tensors are called; of experts in one tensor that
    # cannot be sliced the plan says why
    if (is_coded(tensors) or name.endswith("_proj")) and not is_fused(name, tensors):
        return dataclasses.replace(unrecognized(tensors), no_class=no_class)
    return None


def _with_what_is_beside(
    found: StoredFormat, tensors: Tensors, config: Mapping[str, Any], name: str
) -> StoredFormat:
    """A format with the factor or the obstacle that tensors beside it, or config.json, make."""
    kind = layer_kind(name, has_matrix=True, family=DECODER)
    is_served = kind in _SERVED
    if found.is_float and not is_served:
        return found
    if name and kind != "expert" and found.method and not METHODS[found.method].serves_linear:
        found = dataclasses.replace(found, method="", arguments={})
    # as tools that split a model over processes leave behind
    if empty := sorted(x for x in found.suffixes & tensors.keys() if 0 in tensors[x].shape):
        return dataclasses.replace(found, obstacle=f"its {' and '.join(empty)} has no elements")
    beside = sorted(tensors.keys() - found.suffixes)
    unknown = [suffix for suffix in beside if not _is_harmless(suffix, found)]
    factor = tensors.get(_FACTOR)
    if unknown == [_FACTOR] and factor is not None and _is_factor(factor, found):
        return dataclasses.replace(
            found,
            method=found.method if found.is_float else "",
            description=f"{found.description} with {_FACTOR}",
            suffixes=found.suffixes | {_FACTOR},
            factor=_FACTOR,
            obstacle=why_transformed(config, name),
        )
    obstacle = f"this release does not know the {' and '.join(unknown)} beside it"
    if not unknown:
        obstacle = found.obstacle or (why_transformed(config, name) if is_served else "")
    return dataclasses.replace(found, obstacle=obstacle)


def _is_harmless(suffix: str, found: StoredFormat) -> bool:
    """Whether a tensor beside a weight leaves it what it is."""
    is_bias = suffix == "bias" or (found.is_float and suffix.endswith("bias"))
    return is_bias or suffix in BUFFERS or _OF_ACTIVATIONS.fullmatch(suffix) is not None


def _is_factor(factor: StoredTensor, found: StoredFormat) -> bool:
    is_row = bool(found.K) and factor.shape == (found.K,)
    return is_row and found.is_readable and factor.dtype in FLOAT_DTYPES


def faults_as_stored(stored: StoredFormat, shape: LayerShape, target: Target) -> list[Fault]:
    """Return what keeps SGLang's own class from an expert under `auto`, with remedies."""
    one = next((one for one in formats() if one.name == stored.format), None)
    if one is not None and one.faults_as_stored is not None:
        found = one.faults_as_stored(stored, shape, target)
        return [fault._replace(remedy=fault.remedy or _OTHERWISE) for fault in found]
    if not isinstance(one, Method):
        return []
    known = {**stored.facts, **stored.said, **stored.arguments}
    given = {key: known[key] for key in one.defaults if key in known}
    if stored.is_one_group:
        given["group_size"] = stored.K
    return find_faults(one.name, {**one.defaults, **given}, shape, target)


def said_of(config: Mapping[str, Any], name: str) -> Said:
    """Read what a `quantization_config` says of a layer, ignore lists and overrides applied.

    Raises:
        CheckpointError: one of its patterns is no regular expression.
    """
    reader = _readers().get(str(config.get("quant_method", "")).lower())
    said = dataclasses.replace(reader(config, name) if reader else Said(), config=config)
    is_ignored = None if _is_passed_over(name) else _is_ignored(said, name)
    return dataclasses.replace(said, is_ignored=is_ignored)


@functools.cache
def _readers() -> Mapping[str, Callable[[Mapping[str, Any], str], Said]]:
    return {name: reader for one in formats() for name, reader in one.read_config.items()}


def _is_passed_over(name: str) -> bool:
    """Whether quantizers pass a layer over without saying so: all but blocks' linear layers."""
    outside = bool(name) and _NOT_IN_BLOCKS.fullmatch(name) is not None
    is_named = layer_kind(name, has_matrix=True, family=DECODER) in NEVER_QUANTIZED
    return outside or is_named or "norm" in last_component(name)


def _is_ignored(said: Said, name: str) -> bool | None:
    """Whether a list leaves the layer out; None where tools read the entry differently."""
    ignored = _ignored(_Lists(map(said.config.get, _IGNORE_KEYS)))
    parent, _, last = name.rpartition(".")
    fused = [module for module, shards in DECODER.fused_modules.items() if last in shards]
    for spelled in (last, *fused):
        spelling = f"{parent}.{spelled}" if parent else spelled
        if ignored.holds(spelling, whole=said.ignores == "named"):
            return True
    return None if said.ignores == "within" and ignored.holds_part_of(name) else False


class _Lists(tuple[Any, ...]):
    """Lists of a config.json, equal to themselves: they may be too long to be compared."""

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(tuple(map(id, self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Lists) and all(map(operator.is_, self, other))


class _Ignored:
    """The lists of layers that are left alone, of which some have a line for each layer."""

    def __init__(self, entries: list[str]) -> None:
        self.patterns = [x for x in entries if x.startswith("re:") or re.search(r"[*?\[]", x)]
        self.names = frozenset(entries).difference(self.patterns)

    def holds(self, name: str, *, whole: bool) -> bool:
        """Whether an entry is a layer or, unless it has to be the whole of one, a part of it."""
        parts = name.split(".")
        ends = (len(parts),) if whole else range(1, len(parts) + 1)
        runs = (".".join(parts[start:end]) for end in ends for start in range(end))
        return not self.names.isdisjoint(runs) or any(
            matches(entry[3:], name)
            if entry.startswith("re:")
            else fnmatch.fnmatchcase(f".{name}.", f"*.{entry}.{'' if whole else '*'}")
            for entry in self.patterns
        )

    def holds_part_of(self, name: str) -> bool:
        """Whether an entry is any part of a layer's name, as some tools look for them."""
        if len(self.names) < len(name) ** 2:
            return any(entry in name for entry in (*self.names, *self.patterns))
        ends = range(len(name) + 1)
        pieces = {name[start:end] for end in ends for start in range(end + 1)}
        return not self.names.isdisjoint(pieces) or any(x in name for x in self.patterns)


@functools.lru_cache(maxsize=8)
def _ignored(lists: _Lists) -> _Ignored:
    return _Ignored([entry for entries in lists for entry in strings(entries)])


def _contradictions(found: StoredFormat, said: Said) -> tuple[str, ...]:
    """Where config.json says something else of a layer than its tensors do."""
    if said.encoding is None or said.is_ignored is None or not found.encoding:
        return ()
    encoding = FLOAT if said.is_ignored else said.encoding
    if encoding != found.encoding:
        is_float = encoding == FLOAT
        says = "leaves it unquantized" if is_float else f"says {said.label or said.encoding}"
        return (f"is stored as {found.description}, config.json {says}",)
    return tuple(
        f"is stored with {key} {stored}, config.json says {said.facts[key]}"
        for key, stored in found.facts.items()
        if said.facts.get(key) is not None
        and _plain(stored, found.K) != _plain(said.facts[key], found.K)
    )


def _plain(value: Any, K: int) -> Any:
    """One spelling of a value: a group of all of K is K."""
    return K if value == -1 else list(value) if isinstance(value, list | tuple) else value


class FormatCache:
    """The formats of the layers of sources, each found once.

    Layers of one source that are alike but for numbers in their names, with tensors of the same
    dtypes and shapes, share one object: large models have many layers of few kinds.
    """

    def __init__(self) -> None:
        self._known: dict[str, dict[str, StoredFormat | None]] = {}
        self._shared: dict[object, StoredFormat | None] = {}
        # by the address of a config: its source, and so it, outlives the plan's making
        self._apart: dict[int, bool] = {}
        self._below: dict[str, Mapping[str, str]] = {}

    def of(self, source: Source, name: str) -> StoredFormat | None:
        """The format of one layer of a source; see `recognize`."""
        known = self._known.setdefault(source.name, {})
        if name not in known:
            known[name] = self._find(source, name)
        return known[name]

    def _find(self, source: Source, name: str) -> StoredFormat | None:
        tensors, config = source.layers[name], source.quantization_config_of(name)
        if config and id(config) not in self._apart:
            self._apart[id(config)] = _tells_layers_apart(config)
        has_own = any(name in layers for layers in source.transforms.values())
        is_alone = has_own or (config and self._apart[id(config)])
        alike = name if is_alone else without_numbers(name)
        signature = tuple([(suffix, t.dtype, t.shape) for suffix, t in tensors.items()])
        key = (source.name, alike, signature, id(config) if config else 0)
        if key not in self._shared:
            self._shared[key] = recognize(tensors, config, name, source.transforms)
        found = self._shared[key]
        if source.name not in self._below:
            self._below[source.name] = _layers_below(source)
        below = self._below[source.name].get(name)
        if found is None or below is None:
            return found
        if layer_kind(name, has_matrix=True, family=DECODER) not in _SERVED:
            return found
        text = f"this release does not know the {below.removeprefix(name)[1:]} below it"
        return dataclasses.replace(found, obstacle=text)


def _layers_below(source: Source) -> Mapping[str, str]:
    """Layer -> one that is below it: an adapter, a rotation, a quantizer's state."""
    found: dict[str, str] = {}
    above: dict[str, list[str]] = {}
    for name in source.layers:
        parent = rest = name.rpartition(".")[0]
        if parent not in above:
            above[parent] = []
            while rest:
                above[parent] += [rest] if rest in source.layers else []
                rest = rest.rpartition(".")[0]
        for layer in above[parent]:
            found.setdefault(layer, name)
    return found


def _tells_layers_apart(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` may say something else of two layers that differ in numbers.

    False where no pattern or ignored name in it has a digit or a class of digits.
    """
    keys = (*_IGNORE_KEYS, "dynamic", "extra_config", "block_name_to_quantize")
    # the names of groups themselves, `group_0`, say nothing of layers
    groups = config.get("config_groups")
    sections = [config.get(key) for key in keys]
    sections += groups.values() if isinstance(groups, Mapping) else []
    sections.append(patterns(config))
    return any(re.search(r"[\d\\\[]", text) for text in _texts(sections))


def _texts(value: Any) -> list[str]:
    """Every string in a value of config.json, keys too."""
    if isinstance(value, Mapping):
        return _texts([*value, *value.values()])
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []
