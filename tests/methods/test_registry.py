from __future__ import annotations

import ast
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from mixedprec_plugin.errors import MethodError
from mixedprec_plugin.methods import registry
from mixedprec_plugin.methods.registry import (
    METHODS,
    MethodTable,
    add_entry_points,
    bind,
    suggest_method,
)
from tests.methods.packages import GROUP, install


def test_table_keys_are_the_specs_names() -> None:
    assert list(METHODS) == [
        "bf16", "fp8", "fp8_channel", "blockwise_int8", "int8_channel", "awq", "gptq",
        "humming", "nvfp4", "mxfp4", "auto",
    ]  # fmt: skip
    assert all(name == spec.name for name, spec in METHODS.items())


def test_no_code_outside_methods_spells_a_methods_name() -> None:
    """But for `auto` and `bf16`: SGLang's options and dtypes are called so, too."""
    names = set(METHODS) - {registry.AUTO, registry.UNQUANTIZED}
    package = Path(registry.__file__).parents[1]
    files = [x for x in package.rglob("*.py") if x.relative_to(package).parts[0] != "methods"]
    found = [
        f"{path.name}:{node.lineno}: {node.value}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    ]
    assert found == []
    assert len(files) > 150


def test_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        METHODS["fp8"] = METHODS["awq"]  # type: ignore[index]


def test_every_name_is_used_once() -> None:
    names = registry.method_names()
    assert len(names) == len(set(names))
    assert {"fp8", "fp16", "int8", "awq_int4", "gptq_int4", "fp8_block", "unquantized"} < set(names)


@pytest.mark.parametrize("name", registry.method_names())
def test_every_name_binds_to_all_arguments_of_its_method(name: str) -> None:
    method, arguments = bind(name, {})
    assert set(arguments) == set(METHODS[method].defaults)
    assert METHODS[method].conflict(arguments) == ""


@pytest.mark.parametrize("name", registry.method_names())
def test_binding_the_result_again_changes_nothing(name: str) -> None:
    bound = bind(name, {})
    assert bind(*bound) == bound


@pytest.mark.parametrize(
    ("name", "method", "argument", "value"),
    [
        ("bf16", "bf16", "dtype", "bfloat16"),
        ("fp16", "bf16", "dtype", "float16"),
        ("none", "bf16", "dtype", None),
        ("fp8", "fp8", "weight_block_size", None),
        ("fp8", "fp8", "activation_scheme", "dynamic"),
        ("fp8_block", "fp8", "weight_block_size", [128, 128]),
        ("int8", "blockwise_int8", "weight_block_size", [128, 128]),
        ("awq_int4", "awq", "bits", 4),
        ("awq", "awq", "group_size", 128),
        ("awq", "awq", "zero_point", True),
        ("gptq", "gptq", "bits", 4),
        ("gptq", "gptq", "group_size", 128),
        ("gptq", "gptq", "sym", True),
        ("gptq", "gptq", "desc_act", None),
        ("gptq_int8", "gptq", "bits", 8),
    ],
)
def test_name_implies_argument(name: str, method: str, argument: str, value: object) -> None:
    bound_method, arguments = bind(name, {})
    assert bound_method == method
    assert arguments[argument] == value


def test_given_arguments_win_over_defaults() -> None:
    assert bind("gptq_int8", {"group_size": 64})[1]["group_size"] == 64


def test_tuples_bind_as_lists() -> None:
    assert bind("fp8", {"weight_block_size": (128, 128)}) == bind("fp8_block", {})


def test_bound_lists_are_copies_of_the_defaults() -> None:
    bind("int8", {})[1]["weight_block_size"].append(1)
    assert bind("int8", {})[1]["weight_block_size"] == [128, 128]


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(MethodError, match=r"unknown method 'gtpq'.*; did you mean 'gptq'"):
        bind("gtpq", {})


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("fp8_blok", "did you mean 'fp8_block' or 'int8_block'?"),
        ("FP8", "did you mean 'fp8'?"),
        ("int4", "did you mean 'awq_int4' or 'gptq_int4'?"),
        ("w4a16", "did you mean 'awq' or 'gptq' or 'nvfp4' or 'mxfp4'?"),
        ("int3", "did you mean 'humming_int3'?"),
        ("int1", "mixedprec methods explains them"),
        # more digits than Python makes a number of
        ("int" + "1" * 5000, "mixedprec methods explains them"),
        ("bitsandbytes", "mixedprec methods explains them"),
    ],
)
def test_unknown_name_suggests_what_has_as_many_bits(name: str, remedy: str) -> None:
    assert suggest_method(name) == remedy


def test_unknown_argument_suggests_the_nearest() -> None:
    with pytest.raises(
        MethodError, match=r"gptq_int4: unknown argument 'groupsize' .*did you mean 'group_size'"
    ):
        bind("gptq_int4", {"groupsize": 64})


def test_every_unknown_argument_is_reported() -> None:
    with pytest.raises(MethodError) as caught:
        bind("awq", {"sym": True, "desc_act": False})
    assert len(caught.value.problems) == 2


def test_argument_against_its_alias_raises() -> None:
    with pytest.raises(
        MethodError,
        match=r"gptq_int8: bits: 4 contradicts the name 'gptq_int8' \(expected 8\); "
        r"leave bits out, or write 'method: gptq'",
    ):
        bind("gptq_int8", {"bits": 4})


def test_argument_that_repeats_its_alias_is_taken() -> None:
    assert bind("gptq_int8", {"bits": 8})[1]["bits"] == 8


def test_static_activations_with_blocks_raise() -> None:
    with pytest.raises(
        MethodError,
        match=r"fp8_block: activation_scheme: 'static' does not go with weight_block_size: "
        r"\[128, 128\] \(expected 'dynamic'\)",
    ):
        bind("fp8_block", {"activation_scheme": "static"})


def entry_point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, f"tests.methods.{value}", GROUP)


def test_entry_point_adds_a_method() -> None:
    methods = add_entry_points(METHODS, [entry_point("foreign", "foreign:SPEC")])
    assert methods["foreign"].title == METHODS["gptq"].title
    assert "foreign" not in METHODS


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gone", "no_such_module:SPEC", "cannot be loaded: ModuleNotFoundError: No module named"),
        ("gone", "foreign:NO_SUCH", "cannot be loaded: AttributeError: .*'NO_SUCH'"),
        ("mine", "foreign:NOT_A_SPEC", r"is a dict \(expected a mixedprec_plugin Method\)"),
        ("other", "foreign:SPEC", r"names its method 'foreign' \(expected 'other'"),
        ("fp8", "foreign:TAKES_BUILT_IN_NAME", "the name 'fp8' is taken by the method fp8"),
        ("mine", "foreign:TAKES_ALIAS", "the name 'int8' is taken by the method blockwise_int8"),
    ],
)
def test_bad_entry_point_raises_and_is_named(name: str, value: str, message: str) -> None:
    named = f"entry point '{name} = tests.methods.{value}' of {GROUP}: "
    with pytest.raises(MethodError, match=named + message):
        add_entry_points(METHODS, [entry_point(name, value)])


def test_all_bad_entry_points_are_reported() -> None:
    points = [entry_point("one", "gone:SPEC"), entry_point("two", "gone:SPEC")]
    with pytest.raises(MethodError) as caught:
        add_entry_points(METHODS, points)
    assert len(caught.value.problems) == 2


def test_table_finds_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "tests.methods.foreign:SPEC")
    table = MethodTable(dict(METHODS))
    monkeypatch.syspath_prepend(tmp_path)
    assert list(table) == [*METHODS, "foreign"]


def test_broken_package_is_an_error_at_every_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "tests.methods.gone:SPEC")
    table = MethodTable(dict(METHODS))
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        with pytest.raises(MethodError, match=r"third-party: .*uninstall third-party"):
            table["fp8"]
