from __future__ import annotations

import dataclasses
from importlib.metadata import version
from typing import Any

import pytest

from mixedprec_plugin.errors import MethodError
from mixedprec_plugin.methods.construct import (
    check_signature,
    config_key,
    load_class,
    offered,
    sglang_version,
)
from mixedprec_plugin.methods.registry import METHODS, bind


class Renamed:
    """`AWQConfig` as it would be if its bits were renamed."""

    def __init__(self, bits: int, group_size: int, zero_point: bool, skip: Any = None) -> None: ...


def test_matching_arguments_pass() -> None:
    check_signature(Renamed, {"bits": 4, "group_size": 128, "zero_point": True})


def test_renamed_argument_is_named_with_what_is_taken() -> None:
    given = METHODS["awq"].config_arguments(bind("awq", {})[1], "cpu")
    with pytest.raises(MethodError) as caught:
        check_signature(Renamed, given, "awq")
    takes = "(expected bits, group_size, zero_point, skip)"
    remedy = "install a release that mixedprec-plugin supports, and run 'mixedprec doctor'"
    assert [str(problem) for problem in caught.value.problems] == [
        f"awq: Renamed of SGLang {sglang_version()} does not take the argument 'weight_bits' "
        f"{takes}; {remedy}",
        f"awq: Renamed of SGLang {sglang_version()} does not take the argument "
        f"'modules_to_not_convert' {takes}; {remedy}",
        f"awq: Renamed of SGLang {sglang_version()} needs the argument 'bits', which the method "
        f"does not make {takes}; {remedy}",
    ]


def test_any_keyword_passes_where_the_class_takes_any() -> None:
    class Loose:
        def __init__(self, **settings: Any) -> None: ...

    check_signature(Loose, {"weight_bits": 4})


def test_version_is_the_installed_one() -> None:
    assert sglang_version() == version("sglang")


@pytest.mark.parametrize(
    ("platform", "capability", "key"),
    [
        ("cuda", 90, "cuda"),
        ("cuda", 80, "cuda"),
        ("cuda", 75, "cuda_fallback"),
        ("cuda", None, "cuda"),
        ("cpu", 75, "cpu"),
        ("cuda_fallback", 90, "cuda_fallback"),
    ],
)
def test_old_gpus_get_plain_awq(platform: str, capability: int | None, key: str) -> None:
    assert config_key(METHODS["awq"], platform, capability) == key


def test_method_without_a_class_raises() -> None:
    with pytest.raises(MethodError, match=r"bf16: has no SGLang config class: SGLang's unquant"):
        config_key(METHODS["bf16"], "cuda", 90)


def test_unknown_platform_raises() -> None:
    with pytest.raises(MethodError, match=r"on 'tpu' \(expected cuda, cpu\)"):
        config_key(METHODS["fp8"], "tpu", None)


def test_class_that_sglang_lacks_raises() -> None:
    lazy = "mixedprec_plugin.names:NoSuchConfig"
    spec = dataclasses.replace(METHODS["fp8"], config_classes={"cuda": lazy})
    with pytest.raises(MethodError, match=f"fp8: {lazy} cannot be imported with SGLang .*has no"):
        load_class(spec, "cuda")


def test_what_a_method_offers_sglang_is_found_or_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert offered("auto", "UNSUMMED_EXPERTS", ()) == ()
    spec = dataclasses.replace(METHODS["awq"], sglang="mixedprec_plugin.methods.awq.gone")
    monkeypatch.setattr("mixedprec_plugin.methods.construct.METHODS", {"awq": spec})
    with pytest.raises(MethodError, match=r"awq: .*awq\.gone cannot be imported with SGLang"):
        offered("awq", "UNSUMMED_EXPERTS", ())
