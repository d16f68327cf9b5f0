"""Values of environment variables are written nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import write_llama
from tests.convert.test_convert import convert
from tests.presets import write_preset

SECRET = "${oc.env:MIXEDPREC_TEST_SECRET}"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MIXEDPREC_TEST_SECRET", "hunter2")
    return "hunter2"


def test_files_hold_names_of_variables_and_no_values(tmp_path: Path, secret: str) -> None:
    model = write_llama(tmp_path / "model")
    write_llama(tmp_path / "hunter2")
    preset = write_preset(
        tmp_path,
        'match: "*.mlp.*", method: fp8',
        'match: "*.self_attn.*", method: bf16, source: other',
        head=f"description: by {SECRET}\nsources: {{other: {{path: '{tmp_path}/{SECRET}'}}}}\n",
    )
    assert convert(model, preset, tmp_path / "out")[0] == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert not any(secret.encode() in data for data in written.values())
    assert f"by \\\\{SECRET}".encode() in written["config.json"]
    assert f"{tmp_path}/{SECRET}".encode() in written["mixedprec_provenance.json"]


def test_pattern_from_the_environment_is_refused_at_once(tmp_path: Path, secret: str) -> None:
    model = write_llama(tmp_path / "model")
    preset = write_preset(
        tmp_path,
        'match: "*.mlp.*", method: fp8',
        f'match: "*.{SECRET}.*", method: bf16, optional: true',
    )
    code, text, err = convert(model, preset, tmp_path / "out")
    assert code == 1
    assert (
        f"preset.yaml:4: rules[1]: *.{SECRET}.* reads an environment variable, whose value "
        "config.json would hold; write the pattern out, or set it with --mixedprec-set"
    ) in text + err
    assert secret not in text + err
    assert not (tmp_path / "out").exists()


def test_message_of_a_source_names_the_variable(tmp_path: Path, secret: str) -> None:
    model = write_llama(tmp_path / "model")
    preset = write_preset(
        tmp_path,
        'match: "*", method: bf16, source: other',
        head=f"sources: {{other: {{path: '{tmp_path}/{SECRET}'}}}}\n",
    )
    code, text, err = convert(model, preset, tmp_path / "out")
    assert code != 0
    assert f"sources.other: {tmp_path}/{SECRET}" in text + err
    assert secret not in text + err


@pytest.mark.parametrize("spelling", ["/{}", "/./{}/", "/model/../{}"])
def test_error_of_the_work_itself_names_the_variable(
    tmp_path: Path, secret: str, spelling: str
) -> None:
    model = write_llama(tmp_path / "model")
    write_llama(tmp_path / "hunter2")
    preset = write_preset(
        tmp_path,
        'match: "*.mlp.*", method: bf16, source: other',
        head=f"sources: {{other: {{path: '{tmp_path}{spelling.format(SECRET)}'}}}}\n",
    )
    code, text, err = convert(model, preset, tmp_path / "hunter2" / "out")
    assert code == 1
    assert f"is inside the source 'other' ({tmp_path}" in err
    assert secret not in text + err
