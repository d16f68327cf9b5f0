"""The command line's way into `model_loader_extra_config`; needs no SGLang."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from mixedprec_plugin.errors import UsageError
from mixedprec_plugin.serving.flags import add_flags, fold_flags
from mixedprec_plugin.serving.settings import Settings, parse_extra_config, split_extra_config


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--model-loader-extra-config", default="{}")
    add_flags(parser)
    return parser.parse_args(argv)


def test_flags_travel_in_the_extra_config_with_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").touch()
    args = fold_flags(
        parse(
            "--load-format", "mixedprec", "--mixedprec-config", "x.yaml",
            "--mixedprec-set", "rules.0.bits=8", "--mixedprec-set", "version=1",
            "--mixedprec-plan", "plan.json", "--mixedprec-quantize-on", "cpu",
            "--model-loader-extra-config", '{"num_threads": 2}',
        )
    )  # fmt: skip
    extra = json.loads(args.model_loader_extra_config)
    assert extra == {
        "num_threads": 2,
        "mixedprec_config": str(tmp_path / "x.yaml"),
        "mixedprec_set": ["rules.0.bits=8", "version=1"],
        "mixedprec_plan": str(tmp_path / "plan.json"),
        "mixedprec_quantize_on": "cpu",
    }
    settings, rest = split_extra_config(extra)
    assert rest == {"num_threads": 2}
    assert settings == Settings(
        str(tmp_path / "x.yaml"),
        ("rules.0.bits=8", "version=1"),
        str(tmp_path / "plan.json"),
        quantize_on="cpu",
    )


def test_place_to_quantize_on_that_is_none_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"mixedprec_quantize_on: 'gpu' \(expected device or cpu\)"
    ):
        split_extra_config({"mixedprec_quantize_on": "gpu"})


def test_inputs_go_to_a_folder_that_every_rank_can_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("--load-format", "mixedprec", "--mixedprec-inputs", "inputs")
    settings, _ = split_extra_config(
        parse_extra_config(fold_flags(parse(*asked)).model_loader_extra_config)
    )
    assert settings == Settings(inputs=str(tmp_path / "inputs"))
    assert settings.num_input_tokens == 2048
    for wrong in ("many", "319"):
        with pytest.raises(
            UsageError, match=rf"'{wrong}' is not a number .*\(expected 320 or more\)"
        ):
            fold_flags(parse(*asked, "--mixedprec-inputs-tokens", wrong))


def test_name_of_a_packaged_preset_stays_a_name() -> None:
    args = fold_flags(parse("--load-format", "mixedprec", "--mixedprec-config", "fp8-block"))
    assert parse_extra_config(args.model_loader_extra_config) == {"mixedprec_config": "fp8-block"}


def test_preset_may_come_in_the_extra_config_itself() -> None:
    extra = '{"mixedprec_config": "gptq"}'
    args = fold_flags(parse("--load-format", "mixedprec", "--model-loader-extra-config", extra))
    assert json.loads(args.model_loader_extra_config) == {"mixedprec_config": "gptq"}


def test_checkpoint_may_carry_the_preset_itself() -> None:
    args = fold_flags(parse("--load-format", "mixedprec", "--mixedprec-verify", "/bf16"))
    settings, _ = split_extra_config(parse_extra_config(args.model_loader_extra_config))
    assert settings == Settings(config="", verify="/bf16")


def test_flags_add_to_what_the_extra_config_says() -> None:
    extra = '{"mixedprec_config": "gptq", "mixedprec_set": ["a=1"]}'
    args = fold_flags(
        parse("--load-format", "mixedprec", "--model-loader-extra-config", extra,
              "--mixedprec-plan", "/plan.json")
    )  # fmt: skip
    settings, _ = split_extra_config(parse_extra_config(args.model_loader_extra_config))
    assert settings == Settings("gptq", ("a=1",), "/plan.json")


def test_without_the_load_format_nothing_is_touched() -> None:
    args = parse("--model-loader-extra-config", '{"a":  1}')
    assert fold_flags(args).model_loader_extra_config == '{"a":  1}'


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("--mixedprec-config", "x.yaml"),
            "--mixedprec-config: needs --load-format mixedprec; add it",
        ),
        (
            ("--mixedprec-set", "a=1", "--mixedprec-plan", "p"),
            "--mixedprec-set, --mixedprec-plan: needs --load-format mixedprec",
        ),
        (
            ("--load-format", "mixedprec", "--model-loader-extra-config", "{"),
            "--model-loader-extra-config: is not JSON",
        ),
        (
            ("--load-format", "mixedprec", "--model-loader-extra-config", "[1]"),
            "--model-loader-extra-config: is not a JSON object",
        ),
    ],
)
def test_half_a_request_is_refused(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        fold_flags(parse(*argv))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "extra",
    [
        {"mixedprec_config": 3},
        {"mixedprec_config": "x", "mixedprec_set": "a=1"},
        {"mixedprec_config": "x", "mixedprec_set": [1]},
        {"mixedprec_config": "x", "mixedprec_plan": []},
        {"mixedprec_verify": 1},
    ],
)
def test_settings_of_the_wrong_type_are_refused(extra: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        split_extra_config(extra)
