"""The table of methods, and the binding of a name and arguments to one of them."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.methods import auto, bf16
from mixedprec_plugin.methods.interface import Method
from mixedprec_plugin.names import nearest

ENTRY_POINT_GROUP = "mixedprec.methods"
_NUMBER = re.compile(r"\d+")

# folders beside this file, in the order in which methods are listed
_FOLDERS = (
    "bf16",
    "fp8",
    "fp8_channel",
    "blockwise_int8",
    "int8_channel",
    "awq",
    "gptq",
    "humming",
    "nvfp4",
    "mxfp4",
    "auto",
)


def _built_in() -> Iterator[Method]:
    for folder in _FOLDERS:
        yield importlib.import_module(f"mixedprec_plugin.methods.{folder}").METHOD


BUILT_IN = MappingProxyType({method.name: method for method in _built_in()})
# the two that other packages need to tell from the rest
UNQUANTIZED, AUTO = bf16.METHOD.name, auto.METHOD.name
# what advice starts from: the best of 8 bits first, then what more GPUs run; and 4 bits
USUAL_8_BITS, USUAL_4_BITS = ("fp8_channel", "fp8"), "awq"


class MethodTable(Mapping[str, Method]):
    """Canonical name -> method; other packages' methods are read at the first look.

    Raises:
        MethodError: on every look, while a package's entry point fails or clashes.
    """

    def __init__(self, built_in: Mapping[str, Method]) -> None:
        self._built_in = built_in

    @functools.cached_property
    def _methods(self) -> Mapping[str, Method]:
        points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        return add_entry_points(self._built_in, points)

    def __getitem__(self, name: str) -> Method:
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)


METHODS: Mapping[str, Method] = MethodTable(BUILT_IN)


def add_entry_points(
    methods: Mapping[str, Method], points: Iterable[importlib.metadata.EntryPoint]
) -> dict[str, Method]:
    """Return methods with those that other packages offer, under the names of their entry points.

    Raises:
        MethodError: an entry point cannot be loaded, is no `Method`, or has a name that is
            taken; all of them are named.
    """
    complete = dict(methods)
    problems = []
    for point in points:
        found = _load(point, complete)
        if isinstance(found, Method):
            complete[found.name] = found
            continue
        package = point.dist.name if point.dist else "unknown package"
        where = f"{package}: entry point '{point.name} = {point.value}' of {ENTRY_POINT_GROUP}"
        remedy = f"repair or uninstall {package}"
        problems.append(Problem(where, found, remedy, rule="method-entry-point"))
    if problems:
        raise MethodError(problems)
    return complete


def _load(point: importlib.metadata.EntryPoint, methods: Mapping[str, Method]) -> Method | str:
    """The method behind an entry point, or why it cannot join the table."""
    try:
        loaded = point.load()
    # Importing foreign code may raise anything, and whatever it is becomes the error.
    except Exception as error:  # noqa: BLE001
        return f"cannot be loaded: {type(error).__name__}: {error}"
    if not isinstance(loaded, Method):
        return f"is a {type(loaded).__name__} (expected a mixedprec_plugin Method)"
    if loaded.name != point.name:
        return f"names its method {loaded.name!r} (expected {point.name!r}, as the entry point)"
    taken = {name: other.name for other in methods.values() for name in other.names}
    for name in loaded.names:
        if name in taken:
            return f"the name {name!r} is taken by the method {taken[name]}"
    return loaded


def method_names() -> tuple[str, ...]:
    """Return every name that a preset may use for a method, canonical names and aliases."""
    return tuple(name for spec in METHODS.values() for name in spec.names)


def suggest_method(name: str) -> str:
    """What a name that no method has may mean: one of the same digits, or methods of as many bits.

    `fp8_blok` is near `fp8_block`; `int4` is no `int8`, and means awq or gptq.
    """
    numbers = _NUMBER.findall(name)
    near = nearest(name, [known for known in method_names() if _NUMBER.findall(known) == numbers])
    # one name a method
    near = list({id(_of_name(known)): known for known in reversed(near)}.values())[::-1]
    if same := [known for known in near if known.lower() == name.lower()]:
        near = same
    near = near or [known for known in method_names() if known.endswith(f"_{name.lower()}")]
    if not near and numbers:
        near = [x.name for x in METHODS.values() if f"{_bits(x) or 'none'}" == numbers[0]]
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return "mixedprec methods explains them"


def _of_name(name: str) -> Method | None:
    return next((spec for spec in METHODS.values() if name in spec.names), None)


def _bits(spec: Method) -> int:
    """Whole bits a weight that a method stores by default; 0 where it stores none of its own."""
    num_bytes = sum(x.num_bytes for x in spec.stored(spec.defaults, 1024, 1024, "BF16").values())
    return 8 * num_bytes >> 20


def bind(name: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Bind a method's name and arguments.

    Args:
        name: a canonical name or an alias, such as `gptq_int8`.
        arguments: what the user gave; not modified. Values are not checked here, the method's JSON
            Schema does that.
    Returns:
        The canonical name and all the method's arguments: what was given, then what the alias
        implies, then the defaults. Binding the result again gives the same.
    Raises:
        MethodError: an unknown name, an unknown argument, an argument that contradicts the alias or
            another argument.
    """
    spec = _of_name(name)
    if spec is None:
        what = f"unknown method {name!r} (expected {', '.join(METHODS)})"
        raise MethodError(Problem("", what, suggest_method(name), "unknown-method"))
    given = {key: _plain(value) for key, value in arguments.items()}
    implied = dict(spec.aliases.get(name, {}))
    defaults = spec.defaults
    problems = [_unknown(name, key, defaults) for key in given if key not in defaults]
    problems += [
        Problem(
            name,
            f"{key}: {given[key]!r} contradicts the name {name!r} (expected {value!r})",
            f"leave {key} out, or write 'method: {spec.name}'",
            rule="alias-contradiction",
        )
        for key, value in implied.items()
        if key in given and given[key] != value
    ]
    if problems:
        raise MethodError(problems)
    bound = {key: _plain(value) for key, value in {**defaults, **implied, **given}.items()}
    if conflict := spec.conflict(bound):
        raise MethodError(Problem(name, conflict, rule="argument-conflict"))
    return spec.name, bound


def _plain(value: Any) -> Any:
    """Tuples as lists, so that one value has one spelling; lists are copied."""
    return list(value) if isinstance(value, list | tuple) else value


def _unknown(method: str, name: str, known: Iterable[str]) -> Problem:
    near = nearest(name, known)
    remedy = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    what = f"unknown argument {name!r} (expected {', '.join(known)})"
    return Problem(method, what, remedy, "unknown-argument")
