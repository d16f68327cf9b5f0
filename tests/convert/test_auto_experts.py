"""Converting experts that run by another checkpoint's own `quantization_config`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.stream import VirtualCheckpoint, open_virtual_checkpoint
from mixedprec_plugin.methods.interface import Device, Target
from mixedprec_plugin.plan.preset import preset_for
from mixedprec_plugin.plan.resolve import resolve_plan
from tests.checkpoint.peer_experts import MODULE, write_experts
from tests.checkpoint.peers import FOLDERS, quantization_config
from tests.commands import converted
from tests.presets import write_preset
from tests.tensors import same_bytes


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("peer", FOLDERS)
def test_converted_experts_are_what_their_source_stores_and_says(
    tmp_path: Path, peer: str, device: Device
) -> None:
    model = write_experts(tmp_path / "model", "bf16")
    other = write_experts(tmp_path / "other", peer)
    preset = write_preset(
        tmp_path, 'match: "*", method: auto, source: other',
        head=f"trust_sources: true\nsources: {{other: {{path: {json.dumps(str(other))}}}}}\n",
    )  # fmt: skip
    converted(model, preset, tmp_path / "out", device=device)
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
