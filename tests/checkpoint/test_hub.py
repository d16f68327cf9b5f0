"""Sources on the Hugging Face Hub, from a hub of our own on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.hub_server import COMMIT, Hub, serve_hub
from tests.checkpoints import write_llama

pytestmark = pytest.mark.slow
REPO = "someone/tiny-model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model")


@pytest.fixture
def hub(model: Path, tmp_path: Path) -> Iterator[Hub]:
    """The same model on the Hub, each layer in a file of its own, beside a pickle."""
    folder = tmp_path / "published"
    folder.mkdir()
    tensors = load_file(model / "model.safetensors")
    weight_map = {}
    for name in tensors:
        layer = name.split(".")[2] if ".layers." in name else "rest"
        weight_map[name] = f"model-{layer}.safetensors"
    for file_name in set(weight_map.values()):
        part = {
            n: t + (1 if "q_proj" in n else 0)
            for n, t in tensors.items()
            if weight_map[n] == file_name
        }
        save_file(part, folder / file_name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text((model / "config.json").read_text())
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with serve_hub(REPO, folder) as hub:
        yield hub


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text(
        f"version: 1\nsources:\n  other: {{path: {REPO}, revision: main}}\nrules:\n"
        "  - {match: '*.layers.0.self_attn.q_proj', method: bf16, source: other}\n"
    )
    return path


def run(
    code: str, tmp_path: Path, hub: Hub, *argv: str, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own: huggingface_hub reads its settings when it is imported."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1", **extra,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code, *argv], env=environment, text=True, capture_output=True,
        timeout=120, check=False,
    )  # fmt: skip


PLAN = "import sys; from mixedprec_plugin.cli.main import main; sys.exit(main(sys.argv[1:]))"
STREAM = """
import sys
from tests.presets import open_virtual_checkpoint
from safetensors.torch import save_file
save_file({n: t.contiguous() for n, t in open_virtual_checkpoint(*sys.argv[1:3])}, sys.argv[3])
"""


def test_what_init_writes_names_the_model_by_its_id(hub: Hub, tmp_path: Path) -> None:
    preset, page = tmp_path / "mine.yaml", tmp_path / "plan.html"
    done = run(PLAN, tmp_path, hub, "init", "--model", REPO, "--bits", "5", "--out", str(preset))
    assert done.returncode == 0, done.stderr
    text = preset.read_text()
    assert f"--model-path {REPO} --load-format mixedprec" in text
    assert 'description: "Found for tiny-model: ' in text
    words = ("plan", "--model", REPO, "--preset", str(preset), "--html", str(page))
    done = run(PLAN, tmp_path, hub, *words)
    assert done.returncode == 0, done.stderr
    assert f'"path":"{REPO}"' in page.read_text()
    assert COMMIT not in text


def test_plan_reads_headers_and_only_the_planned_file_is_downloaded(
    hub: Hub, model: Path, preset: Path, tmp_path: Path
) -> None:
    done = run(
        PLAN, tmp_path, hub, "plan", "--model", str(model), "--preset", str(preset), "--json"
    )
    assert done.returncode == 0, done.stderr
    sources = {layer["name"]: layer["source"] for layer in json.loads(done.stdout)["layers"]}
    assert [name for name, source in sources.items() if source == "other"] == [
        "model.layers.0.self_attn.q_proj"
    ]
    snapshot = tmp_path / "hf/hub/models--someone--tiny-model/snapshots" / COMMIT
    assert sorted(p.name for p in snapshot.iterdir()) == [
        "config.json", "model.safetensors.index.json"
    ]  # fmt: skip

    out = tmp_path / "out.safetensors"
    done = run(STREAM, tmp_path, hub, str(model), str(preset), str(out))
    assert done.returncode == 0, done.stderr
    assert [p.name for p in snapshot.glob("*.safetensors")] == ["model-0.safetensors"]
    assert not hub.sent("pytorch_model.bin")
    name = "model.layers.0.self_attn.q_proj.weight"
    theirs = load_file(model / "model.safetensors")[name] + 1
    assert torch.equal(load_file(out)[name], theirs)


def test_the_one_file_of_a_repository_may_have_any_name(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "gptq_model-4bit-128g.safetensors")
    snapshot = tmp_path / "hf/hub/models--someone--tiny-model/snapshots" / COMMIT
    with serve_hub(REPO, model) as hub:
        for offline in ("0", "1"):
            done = run(PLAN, tmp_path, hub, "inspect", REPO, HF_HUB_OFFLINE=offline)
            assert done.returncode == 0, done.stderr
            assert "model.layers.0-2.mlp.down_proj" in done.stdout
            shutil.copy(model / "gptq_model-4bit-128g.safetensors", snapshot)


def test_offline_the_cache_serves_what_it_has_and_says_what_it_lacks(
    hub: Hub, model: Path, preset: Path, tmp_path: Path
) -> None:
    argv = (STREAM, tmp_path, hub, str(model), str(preset), str(tmp_path / "out.safetensors"))
    done = run(*argv, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert (
        f"{preset}:3: sources.other: {REPO}: cannot be fetched from the Hugging Face Hub"
        in done.stderr
    )
    assert run(*argv).returncode == 0
    hub.shutdown()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"{{path: {REPO}, revision: nowhere}}", "at revision 'nowhere' (RevisionNotFoundError"),
        ("{path: someone/else}", "someone/else: cannot be fetched from the Hugging Face Hub"),
        ("{path: not a folder}", "not a folder: no such folder; give a local checkpoint folder or"),
    ],
)
def test_what_cannot_be_had_is_an_error_at_its_line(
    hub: Hub, model: Path, tmp_path: Path, path: str, message: str
) -> None:
    preset = tmp_path / "p.yaml"
    preset.write_text(
        f"version: 1\nsources:\n  other: {path}\n"
        "rules: [{match: '*', method: bf16, source: other}]\n"
    )
    done = run(PLAN, tmp_path, hub, "plan", "--model", str(model), "--preset", str(preset))
    assert done.returncode == 1
    assert f"{preset}:3: sources.other" in done.stderr
    assert message in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(("loses", "what"), [("", REPO), (".safetensors", f"{REPO}/model-0.safe")])
def test_connection_that_is_lost_is_an_error_at_its_line(
    hub: Hub, model: Path, preset: Path, tmp_path: Path, loses: str, what: str
) -> None:
    hub.loses = loses
    done = run(PLAN, tmp_path, hub, "plan", "--model", str(model), "--preset", str(preset))
    assert done.returncode == 1
    assert f"{preset}:3: sources.other: {what}" in done.stderr
    assert "cannot be fetched from the Hugging Face Hub at revision" in done.stderr
    assert "(RemoteProtocolError: Server disconnected" in done.stderr.replace("\n", " ")


def _with_header(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        text = json.dumps(change(json.loads(data[8:end]))).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return damage


def _changed(**entry: Any) -> Callable[[Path], None]:
    return _with_header(lambda header: header | {NORM: header[NORM] | entry})


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"short"), "its header is malformed (Failed to parse"),
        (_with_header(lambda _: [1]), "its header is malformed"),
        (_changed(dtype="F99"), "'model.norm.weight' is 'F99' [256]"),
        (_changed(dtype="F4", shape=[3]), "'model.norm.weight' is 'F4' [3] (expected whole bytes"),
        (_changed(dtype=["BF16"]), "its header is malformed"),
        (_changed(shape="ab"), "its header is malformed"),
        (_changed(shape=[255]), "does not span the bytes of its dtype and shape"),
        (_changed(shape=[-16, -16]), "does not span the bytes of its dtype and shape"),
        (_changed(shape=[256.0]), "does not span the bytes of its dtype and shape"),
    ],
)
def test_damaged_header_of_a_file_on_the_hub_is_an_error(
    hub: Hub, model: Path, preset: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    damage(hub.folder / "model-rest.safetensors")
    done = run(PLAN, tmp_path, hub, "plan", "--model", str(model), "--preset", str(preset))
    assert done.returncode == 1
    text = " ".join(done.stderr.split())
    assert "sources.other: " in text
    assert "/model-rest.safetensors: " in text
    assert message in text
    assert "download the file again" in text
