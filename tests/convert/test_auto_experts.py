"""Converting experts that run by another checkpoint's own `quantization_config`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.methods.interface import Device, Target
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import preset_for
from tests.checkpoint.peer_experts import MODULE, write_experts
from tests.checkpoint.peers import FOLDERS, quantization_config
from tests.commands import convert
from tests.plan.test_auto import NO_CLASS
from tests.presets import open_virtual_checkpoint, write_preset
from tests.tensors import same_bytes

# SGLang's class for them reads their zero points as AWQ's
REFUSED = ("llmcompressor-w4a16-asym-g64", "cuda")
# no class of SGLang reads the others
CASES = [
    (peer, device)
    for peer in FOLDERS
    for device in ("cuda", "cpu")
    if device == "cpu" or peer not in NO_CLASS
]


def convert_experts(tmp_path: Path, peer: str, device: str) -> tuple[int, Path, Path, str]:
    """Convert a model whose experts come from a peer; the exit code, model, preset and errors."""
    model = write_experts(tmp_path / "model", "bf16")
    other = write_experts(tmp_path / "other", peer)
    preset = write_preset(
        tmp_path, 'match: "*", method: auto, source: other',
        head=f"trust_sources: true\nsources: {{other: {{path: {json.dumps(str(other))}}}}}\n",
    )  # fmt: skip
    code, _, errors = convert(model, preset, tmp_path / "out", device=device)
    return code, model, preset, errors


def test_experts_that_no_server_could_run_are_refused(tmp_path: Path) -> None:
    code, _, _, errors = convert_experts(tmp_path, *REFUSED)
    assert code == 1
    assert "SGLang reads the zero points of such experts as if they were AWQ's" in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("peer", "device"), [case for case in CASES if case != REFUSED])
def test_converted_experts_are_what_their_source_stores_and_says(
    tmp_path: Path, peer: str, device: Device
) -> None:
    code, model, preset, errors = convert_experts(tmp_path, peer, device)
    assert code == 0, errors
    before = dict(iter(open_virtual_checkpoint(model, preset, Target(device=device))))
    source = open_source(tmp_path / "out")
    plan = resolve_plan(preset_for("", source, (), "preset"), source, Target(device=device))
    assert not plan.errors
    after = dict(iter(VirtualCheckpoint(plan)))
    assert after.keys() == before.keys()
    assert all(same_bytes(after[name], tensor) for name, tensor in before.items())
    (group,) = plan.expert_groups[MODULE]
    method = group.scheme.method
    if device == "cuda":
        assert method == ("bf16" if peer == "bf16" else "auto")
    said = source.quantization_config_of(f"{MODULE}.3.up_proj")
    assert said == ({} if method == "bf16" else quantization_config(peer))
