"""A server that does not ask for the load format is one without the plugin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mixedprec_plugin.evaluate.server import Server, ServerError
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_llama
from tests.commands import converted
from tests.presets import write_preset
from tests.server.conftest import generate

PROMPTS = ("The capital of France is", "Once upon a time there was a little girl who")


def is_registered() -> bool:
    """Whether a process with this environment knows the load format."""
    script = (
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from sglang.srt.arg_groups.choices import LOAD_FORMAT_CHOICES\n"
        "raise SystemExit(0 if 'mixedprec' in LOAD_FORMAT_CHOICES else 3)\n"
    )
    code = subprocess.run([sys.executable, "-c", script], capture_output=True).returncode
    assert code in (0, 3)
    return code == 0


def test_installed_plugin_changes_no_byte_of_the_output(
    widened_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # naming the platform keeps the CPU engine, whatever general plugins SGLANG_PLUGINS admits
    monkeypatch.setenv("SGLANG_PLATFORM", "mixedprec_cpu")
    answers = {}
    for admitted in ("", "no-such-plugin"):
        monkeypatch.setenv("SGLANG_PLUGINS", admitted)
        log_path = tmp_path / f"server-{admitted}.log"
        with Server(widened_model, log_path) as server:
            answers[admitted] = [
                (answer["text"], answer["meta_info"]["output_token_logprobs"])
                for prompt in PROMPTS
                for answer in [generate(server, prompt, max_new_tokens=24)]
            ]
            with pytest.raises(ServerError, match="404"):
                server.request("/mixedprec/plan")
        assert is_registered() == (admitted == "")
    assert answers[""] == answers["no-such-plugin"]


def log_of_end(
    model: Path, log_path: Path, preset: Path | None = None, end: str = "exit code"
) -> str:
    """The log of a server that ends while it starts."""
    server = Server(model, log_path, preset, ["--skip-tokenizer-init"])
    with pytest.raises(ServerError, match=f"the server ended with {end}"), server:
        pass
    return log_path.read_text()


def test_weights_that_are_not_finite_stop_the_server(tmp_path: Path) -> None:
    config = llama_config()
    tensors = llama_tensors(config)
    tensors["model.layers.2.mlp.up_proj.weight"][5, 5] = float("nan")
    model = write_checkpoint(tmp_path / "model", config, tensors)
    preset = write_preset(tmp_path, 'match: "*", method: gptq')
    log = log_of_end(model, tmp_path / "server.log", preset)
    assert "model.layers.2.mlp.up_proj.weight: 1 of 131,072 weights in model.safetensors" in log


def test_preset_that_does_not_fit_stops_the_server_with_exit_code_1(tmp_path: Path) -> None:
    config = llama_config()
    model = write_checkpoint(tmp_path / "model", config, llama_tensors(config))
    preset = write_preset(tmp_path, 'match: "*.q_proj", method: gptq')
    log = log_of_end(model, tmp_path / "server.log", preset, "exit code 1 ")
    assert "mixedprec: 1 error(s)" in log
    assert "model.layers.0-2.self_attn.qkv_proj: its shards need one scheme" in log
    assert "Traceback" not in log


def test_converted_checkpoint_without_the_load_format_is_one_sentence(tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*", method: fp8')
    out = converted(write_llama(tmp_path / "model"), preset, tmp_path / "out", device="cuda")
    log = log_of_end(out, tmp_path / "server.log")
    assert "add --load-format mixedprec" in log
