"""What the comparison of two versions notices, and what it lets pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.before_and_after import differences, folder_facts
from benchmarks.served_facts import model_facts
from tests.checkpoints import write_llama

TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with what a conversion records of it."""
    config = {"version": "0.1", "preset": {"version": 1, "rules": []}}
    made = write_llama(tmp_path / "model", quantization_config=config)
    record = {
        "sources": {"model": {"path": "/one", "revision": None}},
        "inputs": {"the release": "0.1 layout 1", "the sources' files": "aa", "the plan": "bb"},
    }
    (made / "mixedprec_provenance.json").write_text(json.dumps(record))
    return made


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_one_changed_byte_is_told_with_its_tensor(folder: Path) -> None:
    before = folder_facts(folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + json.loads(data[8:start])[TENSOR]["data_offsets"][0]] ^= 1
    path.write_bytes(data)
    whole, tensor = differences(before, folder_facts(folder))
    assert whole.startswith("model.safetensors: 1 of 1 differ; model.safetensors was ")
    group = "model.safetensors model.layers.*.mlp.up_proj.weight: 1 of 3 differ; "
    assert tensor.startswith(f"{group}model.safetensors {TENSOR} was torch.bfloat16 [512, 256] ")


def test_release_and_places_of_sources_may_change_and_nothing_else(folder: Path) -> None:
    before = folder_facts(folder)
    config, record = folder / "config.json", folder / "mixedprec_provenance.json"
    rewrite(config, '"version": "0.1"', '"version": "0.2"')
    for old, new in (("/one", "/two"), ("0.1 layout", "0.2 layout"), ('"aa"', '"cc"')):
        rewrite(record, old, new)
    assert differences(before, folder_facts(folder)) == []
    rewrite(config, '"version": 1', '"version": 2')
    rewrite(record, '"bb"', '"dd"')
    assert differences(before, folder_facts(folder)) == [
        "config.json quantization_config preset version: 1 of 1 differ; "
        "config.json quantization_config preset version was 1, is 2",
        "mixedprec_provenance.json inputs the plan: 1 of 1 differ; "
        'mixedprec_provenance.json inputs the plan was "bb", is "dd"',
    ]


def test_file_that_is_missing_differs(folder: Path) -> None:
    before = folder_facts(folder)
    (folder / "model.safetensors").unlink()
    assert len(differences(before, folder_facts(folder))) > 1
    assert len(differences(folder_facts(folder), before)) > 1


def served(packed: torch.Tensor, name: str) -> torch.nn.Module:
    """A model one of whose modules keeps a tensor beside its parameters."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    torch.nn.init.ones_(model[0].weight)
    torch.nn.init.zeros_(model[0].bias)
    setattr(model[0], name, [packed])
    return model


def test_what_a_module_keeps_counts_whatever_it_is_called() -> None:
    before = model_facts(served(torch.tensor([1, 2]), "packed"))
    assert differences(before, model_facts(served(torch.tensor([1, 2]), "pairs"))) == []
    (line,) = differences(before, model_facts(served(torch.tensor([1, 3]), "packed")))
    assert line.startswith("* keeps *: 1 of 1 differ; 0 keeps 0 was torch.int64 [2] ")
