"""Names in a checkpoint are anybody's: what no terminal should get of them reaches none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import llama_config
from tests.commands import run
from tests.presets import write_preset

ODD = {
    "escape": "\x1b]0;owned\x07\x1b[2J",
    "surrogate": "x\ud800",
    "direction": "a\u202eb\u2066",
    "breaks": "a\nmixedprec: all well\r\x85\u2028",
    "delete": "\x7f\x9b",
    "markup": "[/bold][red]",
}
# what a terminal obeys, or a text cannot be encoded with
_HIDDEN = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def checkpoint(folder: Path, odd: str, **changes: Any) -> Path:
    """A model whose tensors are odd in the layer's name, its middle and the suffix."""
    names = (f"{odd}.weight", f"model.layers.0.{odd}.q_proj.weight", f"model.norm.{odd}")
    header = {
        name: {"dtype": "BF16", "shape": [128, 128], "data_offsets": [n << 15, (n + 1) << 15]}
        for n, name in enumerate(["model.layers.0.mlp.up_proj.weight", *names])
    }
    raw = json.dumps(header).encode()
    folder.mkdir()
    data = len(raw).to_bytes(8, "little") + raw + b"\x80\x3c" * (len(header) << 14)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text(json.dumps(llama_config(**changes)))
    return folder


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("rule", ['match: "*", method: fp8', 'match: "*.no.*", method: fp8'])
def test_odd_names_are_written_as_escapes(tmp_path: Path, odd: str, rule: str) -> None:
    model = checkpoint(tmp_path / "model", odd)
    preset = write_preset(tmp_path, rule)
    for argv in (
        ["inspect", model],
        ["plan", "--model", model, "--preset", preset],
        ["convert", "--model", model, "--preset", preset, "--out", tmp_path / "out"],
        ["verify", "--model", model, "--preset", preset, "--reference", model],
    ):  # fmt: skip
        for more in ([], ["--json"]) if argv[0] != "convert" else ([],):
            code, out, err = run(*argv, *more)
            assert code in (0, 1)
            assert not _HIDDEN.search(out + err), (argv[0], more)
            assert "\nmixedprec: all well" not in out + err


def test_odd_names_in_an_index_and_a_config_are_written_as_escapes(tmp_path: Path) -> None:
    for key, odd in ODD.items():
        said = {"quant_method": odd, "bits": odd, "modules_to_not_convert": [odd]}
        model = checkpoint(tmp_path / key, "x", quantization_config=said, model_type=odd)
        index = {"weight_map": {odd: "model.safetensors", "y": f"{odd}.safetensors"}}
        for argv in (["inspect", model], ["plan", "--model", model, "--preset", "fp8"]):
            assert not _HIDDEN.search("".join(run(*argv)[1:])), (key, argv[0])
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        code, out, err = run("inspect", model)
        assert code == 1
        assert not _HIDDEN.search(out + err), key


def test_a_terminal_that_cannot_show_a_letter_gets_an_escape(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "\u00e9\u4e2d")
    command = [sys.executable, "-m", "mixedprec_plugin.cli.main", "inspect", str(model)]
    code = "import sys; from mixedprec_plugin.cli.main import main; sys.exit(main())"
    command[1:3] = ["-c", code]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=env, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\xe9\\u4e2d" in done.stdout
