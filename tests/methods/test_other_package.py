"""A method of a package outside the tree, built as a wheel and installed beside this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.presets import write_preset

PACKAGE = Path(__file__).resolve().parents[1] / "other_package"
RULE = 'match: "*_proj", method: int8_rows_narrow'
TEXT = (
    "The tides are caused by the gravity of the Moon and the Sun. Where the water of the oceans "
    "is pulled towards them it rises, and twice a day the sea comes in and goes out again."
)
SERVE = """
import json, sys
import sglang

if __name__ == "__main__":
    folder, ids, out = sys.argv[1:]
    engine = sglang.Engine(model_path=folder, load_format="mixedprec", log_level="error")
    answer = engine.generate(
        input_ids=[json.loads(ids)], sampling_params={"max_new_tokens": 1},
        return_logprob=True, logprob_start_len=0,
    )
    found = [entry[0] for entry in answer[0]["meta_info"]["input_token_logprobs"][1:]]
    engine.shutdown()
    open(out, "w").write(json.dumps(found))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the package's wheel is installed in."""
    folder = tmp_path_factory.mktemp("other")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    source = folder / "source"
    subprocess.run(["cp", "-r", str(PACKAGE), str(source)], check=True)
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "-w", str(folder), str(source)],
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    subprocess.run([*pip, "install", *offline, "--target", str(site), str(wheel)], check=True)
    return site


class Shell:
    """Runs Python with the package installed."""

    def __init__(self, site: Path) -> None:
        path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
        self._environment = {**os.environ, "PYTHONPATH": path}

    def run(self, *words: str, code: int = 0) -> str:
        """Run Python with these words; return what it printed."""
        done = subprocess.run(
            [sys.executable, *words], env=self._environment, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def verb(self, *words: str, code: int = 0) -> str:
        """Run one verb of the command line."""
        start = "import sys; from mixedprec_plugin.cli.main import main; sys.exit(main())"
        return self.run("-c", start, *words, code=code)


@pytest.fixture(scope="module")
def shell(installed: Path) -> Shell:
    return Shell(installed)


@pytest.fixture(scope="module")
def converted(shell: Shell, widened_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model, its linear layers quantized by the package's method."""
    folder = tmp_path_factory.mktemp("converted")
    preset, out = write_preset(folder, RULE), folder / "out"
    shell.verb("convert", "--model", str(widened_model), "--preset", str(preset), "--out", str(out))
    return out


def test_plan_names_the_method_and_its_arguments(
    shell: Shell, widened_model: Path, tmp_path: Path
) -> None:
    text = shell.verb(
        "plan", "--json", "--model", str(widened_model), "--preset",
        str(write_preset(tmp_path, RULE)),
    )  # fmt: skip
    layer = next(x for x in json.loads(text)["layers"] if x["name"].endswith("up_proj"))
    assert (layer["method"], layer["action"]) == ("int8_rows", "quantize")
    assert layer["arguments"] == {"top": 63}


def test_wrong_argument_is_refused_by_its_schema(
    shell: Shell, widened_model: Path, tmp_path: Path
) -> None:
    preset = write_preset(tmp_path, 'match: "*", method: int8_rows, top: 12')
    words = ("plan", "--model", str(widened_model), "--preset", str(preset))
    assert shell.verb(*words, code=1) == ""


def test_converted_folder_is_read_again(shell: Shell, converted: Path) -> None:
    listed = json.loads(shell.verb("inspect", "--json", str(converted)))
    layer = next(x for x in listed["layers"] if x["name"].endswith("up_proj"))
    assert (layer["method"], layer["stored"]) == ("int8_rows", "int8 rows up to 63")
    assert listed["disagreements"] == []
    planned = json.loads(shell.verb("plan", "--json", "--model", str(converted)))
    actions = {x["action"] for x in planned["layers"] if x["name"].endswith("_proj")}
    assert actions == {"as stored"}


def test_codes_are_the_rows_over_their_largest_magnitude(
    widened_model: Path, converted: Path
) -> None:
    name = "model.layers.3.mlp.up_proj"
    ours = {k: v.double().numpy() for k, v in load_file(converted / "model.safetensors").items()}
    exact = load_file(widened_model / "model.safetensors")[f"{name}.weight"].double().numpy()
    largest = np.abs(exact).max(1, keepdims=True)
    assert np.allclose(ours[f"{name}.row_scale"], largest / 63, rtol=1e-6)
    steps = np.abs(ours[f"{name}.row_codes"] * ours[f"{name}.row_scale"] - exact) / (largest / 63)
    assert steps.max() < 0.501


def test_folder_without_the_package_is_refused_by_name(converted: Path) -> None:
    plain = Shell(converted)
    text = plain.verb("inspect", str(converted), code=1)
    assert "its tensors are of no format that this release knows (row_codes I8 [" in text


def test_verify_finds_it_near_the_original(
    shell: Shell, widened_model: Path, converted: Path
) -> None:
    text = shell.verb(
        "verify", "--json", "--model", str(converted), "--reference", str(widened_model)
    )
    layers = json.loads(text)["layers"]
    found = [x["relative_error"] for x in layers if x["method"] == "int8_rows"]
    assert len(found) == 210
    assert 0.005 < max(found) < 0.05


def test_engine_serves_it_as_its_dequantized_weights(
    shell: Shell, converted: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(converted)(TEXT)["input_ids"]
    script, out = tmp_path / "serve.py", tmp_path / "logprobs.json"
    script.write_text(SERVE)
    shell.run(str(script), str(converted), json.dumps(ids), str(out))
    found = np.array(json.loads(out.read_text()))

    tensors = load_file(converted / "model.safetensors")
    for name in [n for n in tensors if n.endswith(".row_codes")]:
        layer = name.removesuffix(".row_codes")
        scale = tensors.pop(f"{layer}.row_scale")
        tensors[f"{layer}.weight"] = (tensors.pop(name).float() * scale).bfloat16()
    config = json.loads((converted / "config.json").read_text())
    config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))

    def expected(dtype: torch.dtype) -> np.ndarray:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).to(dtype)
        model.load_state_dict(tensors, strict=False)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        return logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()

    exact = expected(torch.float32)
    rounding = np.abs(expected(torch.bfloat16) - exact).mean()
    assert np.abs(found - exact).mean() < 2 * rounding
