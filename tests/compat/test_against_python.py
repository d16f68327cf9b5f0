"""What is read out of sources, against Python itself and the imported SGLang."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compat.check import Checker, member
from compat.definitions import Definition, find
from compat.signatures import call_signature, misfit, signature
from compat.sources import Sources

# importing SGLang warns, and what it imports does
pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]


def resolved(dotted: str) -> object:
    """The object that a dotted name leads to, by import and getattr."""
    parts = dotted.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for part in parts[size:]:
            found = getattr(found, part)
        return found
    raise AssertionError(dotted)


def test_every_name_that_is_collected_is_real(checker: Checker) -> None:
    names = {use.target for use in checker.uses if use.kind == "name"}
    assert len(names) > 50
    for name in names:
        resolved(name)


def test_every_field_of_server_args_is_real(checker: Checker) -> None:
    from sglang.srt.server_args import ServerArgs

    fields = set(inspect.signature(ServerArgs).parameters)
    used = {use.target.rpartition(".")[2] for use in checker.uses if use.kind == "field"}
    assert {"tp_size", "load_format", "sleep_on_idle"} <= used <= fields


def test_every_override_that_is_collected_overrides(checker: Checker) -> None:
    overrides = [use.target for use in checker.uses if use.kind == "override"]
    assert len(overrides) > 20
    for target in overrides:
        owner, _, name = target.rpartition(".")
        kind = pkgutil.resolve_name(owner)
        assert any(
            name in vars(base) for base in kind.__mro__ if base.__module__.startswith("sglang")
        ), target
        assert member(checker.reference, target) is not None


def test_constructors_read_from_sources_are_those_of_the_classes(checker: Checker) -> None:
    for construction in checker.constructions:
        found = find(checker.reference, construction.config_class)
        assert isinstance(found, Definition)
        read = call_signature(checker.reference, found)
        assert read is not None
        actual = inspect.signature(pkgutil.resolve_name(construction.config_class))
        assert _outline(read) == _outline(actual)


def _outline(read: inspect.Signature) -> list[tuple[str, str, bool]]:
    return [
        (name, parameter.kind.name, parameter.default is not parameter.empty)
        for name, parameter in read.parameters.items()
    ]


_FUNCTIONS = (
    "def f(): pass",
    "def f(a, b=1): pass",
    "def f(a, /, b, *, c, d=2): pass",
    "def f(a, *rest, b=1, **more): pass",
    "def f(*, a): pass",
)


@given(
    text=st.sampled_from(_FUNCTIONS),
    num_positional=st.integers(0, 4),
    keywords=st.sets(st.sampled_from("abcdx")),
)
def test_a_call_fits_exactly_if_python_takes_it(
    text: str, num_positional: int, keywords: set[str]
) -> None:
    scope: dict[str, object] = {}
    exec(text, scope)
    node = ast.parse(text).body[0]
    assert isinstance(node, ast.FunctionDef)
    function = scope["f"]
    assert callable(function)
    try:
        function(*range(num_positional), **dict.fromkeys(keywords))
    except TypeError:
        is_taken = False
    else:
        is_taken = True
    assert (misfit(signature(node), num_positional, keywords) == "") is is_taken


@pytest.mark.parametrize(
    ("dotted", "missing"),
    [
        ("sglang.srt.no_such", ("sglang.srt", "no_such")),
        ("sglang.srt.server_args.NoSuch", ("sglang.srt.server_args", "NoSuch")),
        (
            "sglang.srt.server_args.ServerArgs.no_such",
            ("sglang.srt.server_args.ServerArgs", "no_such"),
        ),
        ("no_such.package", ("the sources", "no_such")),
    ],
)
def test_a_name_that_is_nowhere_is_missing(
    sglang_sources: Sources, dotted: str, missing: tuple[str, str]
) -> None:
    found = find(sglang_sources, dotted)
    assert (found.within, found.name) == missing  # type: ignore[union-attr]
